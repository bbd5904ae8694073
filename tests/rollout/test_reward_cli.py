"""`python -m rollout.reward` as a user meets it: verdicts, fields, bad input, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_outputs import data
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout.errors import InputError
from rollout.reward import cli, report
from rollout.reward.outputs import find_fields, read_outputs
from rollout.types import Verdict

ROOT = Path(__file__).parents[2]
RIGHT = {"output": "so there are</think><answer>42</answer>", "answer": "42", "question": "How many eggs?"}
LOOP = "wait, once more. " * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    return folder


class Texts:
    """Stands for the verifier: right where the texts are equal. Workers are another test's."""

    def verify(self, pairs):
        return [
            Verdict(response.answer == prompt.answer, "right" if response.answer == prompt.answer else "wrong")
            for prompt, response in pairs
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        pass


@pytest.fixture
def score(tokenizer, tmp_path, monkeypatch):
    """Rows in a JSONL file → the records of --out."""
    monkeypatch.setattr(cli, "build_verifier", lambda _: Texts())

    def scored(rows: list, *options: str) -> list[dict]:
        path, out = write(tmp_path / "outputs.jsonl", *rows), tmp_path / "verdicts.jsonl"
        assert cli.main([str(path), "--tokenizer", str(tokenizer), "--out", str(out), *options]) == 0
        assert not list(tmp_path.glob("*.tmp"))
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return scored


def write(path: Path, *rows: dict | str | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def complaint(path: Path, fields: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        list(read_outputs(path, find_fields(path, fields or {})))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    return text


def test_every_verdict_with_reason_place_and_languages(score, capsys):
    found = score(
        [
            RIGHT,
            {**RIGHT, "output": "so</think><answer>41</answer>"},
            {**RIGHT, "output": "no tags"},
            {**RIGHT, "output": f"{LOOP}</think><answer>42</answer>"},
            {**RIGHT, "output": "the 鸡蛋 are</think><answer>42</answer>", "finish_reason": "length"},
        ]
    )
    assert [(each["reason"], each["reward"]) for each in found] == [
        ("right", 1), ("wrong", -1), ("format", -1), ("repetition", -1), ("truncated", -1),
    ]  # fmt: skip
    assert found[0]["id"] == "outputs-000001"
    assert found[0]["scripts"] == {"latin": 1.0}
    assert not found[0]["mixed_languages"]
    assert found[2]["detail"] == "think_not_closed at character 0"
    assert found[3]["detail"].startswith("thinking: tokens 0–")
    assert found[4]["mixed_languages"]
    assert found[4]["foreign_share"] == 0.25
    assert found[4]["scripts"]["han"] == 0.25
    shown = capsys.readouterr().out
    for text in ("fields: output=output, answer=answer", "5 outputs", "repetition", "thinking: tokens", "20.0%"):
        assert text in shown


def test_lists_of_outputs_and_sources(score, capsys):
    tags = ["</think><answer>42</answer>", "</think><answer>41</answer>"]
    found = score(
        [
            {"id": 7, "responses": tags, "gold": 42, "data_source": "easy"},
            {"id": 8, "responses": [tags[0]] * 2, "gold": 42.0, "data_source": "easy"},
            {"id": 9, "responses": tags[:1], "gold": "42", "data_source": "hard"},
        ]
    )
    assert [(each["id"], each["output"], each["source"], each["right"]) for each in found] == [
        ("7", 0, "easy", True), ("7", 1, "easy", False), ("8", 0, "easy", True), ("8", 1, "easy", True), ("9", 0, "hard", True),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "by source" in shown
    assert "of them in between: they teach │ 50.0%" in shown


def test_outputs_without_tags(score, capsys):
    rows = [
        {**RIGHT, "output": r"First 40, then 2, so \boxed{42}."},
        {**RIGHT, "output": "<think>\nhm\n</think>\nThe answer:\n42"},
        {**RIGHT, "output": "The answer:\n42\n"},
        {**RIGHT, "output": LOOP + r"\boxed{42}"},
        {**RIGHT, "output": " \n"},
        {**RIGHT, "output": "<think>\nand so on\n42"},
    ]
    reasons = ["right", "right", "right", "repetition", "format", "format"]
    assert [each["reason"] for each in score(rows, "--format", "none")] == reasons
    assert "--format none" not in capsys.readouterr().out
    assert {each["reason"] for each in score(rows)} == {"format"}
    assert "for outputs without its tags write --format none" in " ".join(capsys.readouterr().out.split())


def test_prefill(score, capsys):
    row = {**RIGHT, "output": "<think>so</think><answer>42</answer>"}
    assert score([row])[0]["detail"].startswith("two_think_blocks")
    assert "--prefill ''" in capsys.readouterr().out
    assert score([row], "--prefill", "")[0]["reason"] == "right"


def test_limits_are_options(score):
    loop = {**RIGHT, "output": "so it goes on. " * 20 + "</think><answer>42</answer>"}
    assert score([loop])[0]["reason"] == "repetition"
    assert score([loop], "--repetition", "min_count=21,max_ngram_share=1")[0]["reason"] == "right"
    assert [each["reason"] for each in score([RIGHT, loop], "--max-tokens", "100")] == ["right", "truncated"]
    assert score([loop], "--max-tokens", "100")[0]["tokens"] == 100


def test_parquet_and_paths_into_columns(score, tmp_path, tokenizer):
    path = tmp_path / "outputs.parquet"
    choices = [[{"text": text}] for text in ("</think><answer>1</answer>", "</think><answer>3</answer>")]
    pq.write_table(pa.table({"choices": choices, "truth": ["1", "2"]}), path)
    arguments = [str(path), "--map", "output=choices.0.text,answer=truth", "--tokenizer", str(tokenizer), "--quiet"]
    assert cli.main([*arguments, "--out", str(tmp_path / "v.jsonl")]) == 0
    assert [json.loads(line)["right"] for line in (tmp_path / "v.jsonl").read_text().splitlines()] == [True, False]


WRONG = {
    "output a number": ({**RIGHT, "output": 5}, ["line 2", "field output", "5 is a int"]),
    "output missing": ({"answer": "42"}, ["line 2", "field output", "is missing"]),
    "no outputs": ({**RIGHT, "output": []}, ["line 2", "field output", "no output"]),
    "one of the outputs": ({**RIGHT, "output": ["a", None]}, ["line 2", "field output", "is a NoneType"]),
    "half a character": ('{"output": "\\ud800", "answer": "1"}', ["line 2", "field output", "surrogate"]),
    "NaN answer": ('{"output": "a", "answer": NaN}', ["line 2", "field answer", "nan is NaN"]),
    "infinite answer": ('{"output": "a", "answer": Infinity}', ["line 2", "field answer", "inf is a float"]),
    "no answer": ({"output": "a"}, ["line 2", "field answer", "is missing"]),
    "blank answer": ({**RIGHT, "answer": " "}, ["line 2", "field answer", "is blank"]),
    "answer a list": ({**RIGHT, "answer": ["1"]}, ["line 2", "field answer", "is a list"]),
    "answer a boolean": ({**RIGHT, "answer": True}, ["line 2", "field answer", "is a bool"]),
    "question a number": ({**RIGHT, "question": 3}, ["line 2", "field question", "3 is a int"]),
    "not JSON": ("{", ["line 2", "is not JSON"]),
    "a list": ("[1]", ["line 2", "is a list"]),
    "not UTF-8": (b'{"output": "\xe9", "answer": "1"}', ["line 2", "is not UTF-8", "iconv"]),
    "a line of 50 MB": (b'{"output": "' + b"a" * 50_000_000 + b'", "answer": "1"}', ["line 2", "50,000,0", "line of its own"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_one_line(case, tmp_path):
    row, expected = WRONG[case]
    text = complaint(write(tmp_path / "outputs.jsonl", RIGHT, row))
    for part in ("outputs.jsonl", *expected):
        assert part in text, text


def test_a_wrong_file_is_one_line(tmp_path):
    assert "no such file" in complaint(tmp_path / "none.jsonl")
    assert "is empty" in complaint(write(tmp_path / "empty.jsonl", ""))
    assert "UTF-16" in complaint(write(tmp_path / "utf16.jsonl", json.dumps(RIGHT).encode("utf-16")))
    assert "field output" in complaint(write(tmp_path / "other.jsonl", {"text": "a", "answer": "1"}))
    assert "no column 'txt'; the nearest is 'text'" in complaint(tmp_path / "other.jsonl", {"output": "txt"})
    assert "'outpt' is no field; the nearest is 'output'" in complaint(tmp_path / "other.jsonl", {"outpt": "text"})
    pq.write_table(pa.table({"output": ["a"], "answer": [float("nan")]}), tmp_path / "nan.parquet")
    assert "row 1, field answer: nan is NaN" in complaint(tmp_path / "nan.parquet")
    pq.write_table(pa.table({"output": [1], "answer": ["1"]}), tmp_path / "type.parquet")
    assert "row 1, field output: 1 is a int" in complaint(tmp_path / "type.parquet")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--repetition", "ngrams=3"], "--repetition: 'ngrams' is no limit"),
        (["--repetition", "ngram=many"], "--repetition: ngram='many' is no int"),
        (["--repetition", "min_covered=2"], "--repetition: min_covered=2 is out of bounds"),
        (["--repetition", "min_count=2"], "--repetition: min_count=2 is out of bounds; give it 3 or more"),
        (["--repetition", "ngram"], "--repetition: 'ngram' is not NAME=VALUE"),
        (["--map", "output"], "--map: 'output' is not NAME=VALUE"),
        (["--max-tokens", "0"], "--max-tokens: 0 is too few"),
        (["--format", "r2"], "invalid choice: 'r2'"),
        (["--out", "nowhere/verdicts.jsonl"], "--out: nowhere/verdicts.jsonl: cannot be written (No such file or directory)"),
    ],
)
def test_a_wrong_option_is_one_line(options, expected, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cli, "build_verifier", lambda _: Texts())
    path = write(tmp_path / "outputs.jsonl", RIGHT)
    with pytest.raises(InputError) as caught:
        cli.main([str(path), "--tokenizer", str(tokenizer), *options])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_tokenizers_and_the_file_itself_as_out(tmp_path, tokenizer):
    path = write(tmp_path / "outputs.jsonl", RIGHT)
    with pytest.raises(InputError, match="is the file that is read"):
        cli.main([str(path), "--tokenizer", str(tokenizer), "--out", str(path)])
    with pytest.raises(InputError, match="there is no such file; name the model's folder"):
        cli.main([str(path), "--tokenizer", str(tmp_path)])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer"):
        cli.main([str(path), "--tokenizer", str(tmp_path)])


def test_a_puzzle_that_cannot_be_scored_is_one_line(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cli, "build_verifier", lambda _: Texts())
    row = {**RIGHT, "id": "a", "metadata": {"source_dataset": "propositional_logic"}}
    path = write(tmp_path / "outputs.jsonl", row)
    arguments = [str(path), "--tokenizer", str(tokenizer), "--quiet"]
    with pytest.raises(InputError, match=r"outputs.jsonl: a: .*'propositional_logic' cannot be scored"):
        cli.main([*arguments, "--rule", "reasoning-gym"])
    assert cli.main(arguments) == 0


def test_a_verdict_file_stays_as_it_was_where_judging_fails(score, tmp_path, monkeypatch):
    score([RIGHT])
    before = (tmp_path / "verdicts.jsonl").read_bytes()

    def fail(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Texts, "verify", fail)
    with pytest.raises(KeyboardInterrupt):
        score([RIGHT, RIGHT])
    assert (tmp_path / "verdicts.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_source_is_text_not_markup():
    summary = report.Summary()
    summary.reasons["wrong"], summary.tokens = 2, [1, 2]
    summary.by_source["[bold]a"]["wrong"] = summary.by_source["b"]["wrong"] = 1
    summary.examples["wrong"].append(("1 · 0", "[0,1] is not [/1]"))
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in report.tables(summary):
        console.print(table)
    shown = console.export_text()
    assert "[bold]a" in shown
    assert "[0,1] is not [/1]" in shown


def test_the_command(tmp_path, tokenizer):
    """With real workers; bad input is one line and exit code 2, and nothing is written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rollout.reward"]
    options = ["--tokenizer", str(tokenizer), "--out", "verdicts.jsonl", "--workers", "1"]
    write(tmp_path / "good.jsonl", RIGHT, {**RIGHT, "answer": "84/2"}, {**RIGHT, "answer": "43"})
    write(tmp_path / "bad.jsonl", RIGHT, '{"output": "a", "answer": NaN}')

    def run(file: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, file, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    bad = run("bad.jsonl")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.splitlines() == [
        "keju: error: bad.jsonl: line 2, field answer: nan is NaN; give it a value, or drop the row"
    ]
    assert not list(tmp_path.glob("verdicts*"))
    good = run("good.jsonl")
    assert good.returncode == 0, good.stderr
    verdicts = [json.loads(line)["reason"] for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert verdicts == ["right", "right", "wrong"]


def test_real_outputs_of_one_source(score, tmp_path, monkeypatch):
    """Qwen's evaluation files as they are: a list of one under `code`."""
    file = next((data() / "traces_skythought").glob("Sky*.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = Counter(each["reason"] for each in score(rows[:12], "--format", "none"))
    assert found == {"repetition": 6, "right": 4, "wrong": 2}, "45^\\circ is not the text 45"
