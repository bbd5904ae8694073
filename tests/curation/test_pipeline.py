"""The whole command: resumed after a kill, the same to the byte, nothing half-written, bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import curation.ingest
import curation.store
from curation import pipeline
from curation.cli import main
from curation.errors import InputError
from curation.options import Options, Source
from curation.pipeline import curate
from curation.store import Rows, Work, parallel_map, replacing

ROOT = Path(__file__).parents[2]
SUFFIXES = (".parquet", ".quarantine.jsonl", ".removed.parquet", ".report.html", ".report.json")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Every step has something to remove."""
    story = (
        "Tom has {} apples and gives {} of them to each of his three friends who came by on Monday evening after school to "
        "play chess in the garden behind the house; how many are left for him in the end?"
    )
    rows = [{"question": story.format(20 + n, n % 5), "answer": str(20 + n - 3 * (n % 5))} for n in range(40)]
    rows += [
        {"question": story.format(20, 0) + " ", "answer": "20"},
        {"question": story.format(21, 1).replace("apples", "pears"), "answer": "18"},
        {"question": "没有答案的题", "answer": "略"},
        {"question": "Which?\nA. 1\nB. 2\nC. 3", "answer": "B"},
        {"question": "A sentence is wanted here", "answer": "because it is not a number at all"},
        {"question": "benchmark question number one about trains", "answer": "1"},
        {"question": "half an answer", "answer": float("nan")},
        {"question": "", "answer": "1"},
        {"question": "已知a=1。\n(1) 求a+1；\n(2) 求a+2。", "answer": "2"},
    ]
    return write(tmp_path / "raw.jsonl", rows)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write(tmp_path / "bench.jsonl", [{"question": "Benchmark question number one, about trains.", "answer": "1"}])


def outputs(out: Path) -> dict[str, bytes]:
    return {suffix: out.with_name(out.stem + suffix).read_bytes() for suffix in SUFFIXES}


def test_every_step_removes_its_row_and_the_report_adds_up(raw: Path, bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "prompts.parquet"
    made = curate([Source(raw)], [Source(bench)], Options(threads=2), out)
    data = made.data
    removed = {step["name"]: step["reasons"] for step in data["steps"]}
    assert removed == {
        "decontaminate": {"exact": 1},
        "ground_truth": {"no_answer": 1},
        "exact": {"same": 1},
        "fuzzy": {"near": 1},
        "semantic": {},
        "question_type": {"choice": 1},
        "verifiable": {"subquestions": 1, "text": 1},
    }
    assert (data["rows_read"], data["rows_quarantined"], data["rows_kept"]) == (49, 2, 40)
    assert data["sources"]["raw"] == {"read": 49, "quarantined": 2, "kept": 40, "removed": 7}
    for before, after in zip(data["steps"], data["steps"][1:], strict=False):
        assert before["out"] == after["in"] == before["in"] - before["removed"]
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(f"prompts{suffix}" for suffix in SUFFIXES)
    table = pq.read_table(out)
    assert table.column_names == ["id", "question", "answer", "solution", "source", "metadata"]
    assert len(set(table["id"].to_pylist())) == len(table) == 40
    assert json.loads(table["metadata"][0].as_py()) == {"origin": "raw.jsonl:line 1"}
    quarantine = [json.loads(line) for line in out.with_name("prompts.quarantine.jsonl").read_text().splitlines()]
    assert [(row["place"], row["field"]) for row in quarantine] == [("line 47", "answer"), ("line 48", "question")]
    gone = pq.read_table(out.with_name("prompts.removed.parquet"))
    assert len(gone) == 7
    assert gone["partner"].to_pylist()[0] == "bench-000001"
    page = out.with_name("prompts.report.html").read_text()
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_exempt_rows_are_only_cleaned(raw: Path, bench: Path, tmp_path: Path) -> None:
    own = write(
        tmp_path / "own.jsonl",
        [
            {"question": "Which?\nA. 1\nB. 2\nC. 3", "answer": "B"},
            {"question": "没有答案的题", "answer": "略"},
            {"question": "1. 已知a=1。\n(1) 求a+1；\n(2) 求a+2。", "answer": "2"},
            {"question": "benchmark question number one about trains", "answer": "1"},
        ],
    )
    out = tmp_path / "prompts.parquet"
    made = curate([Source(raw), Source(own, "own", exempt=True)], [Source(bench)], Options(threads=1), out)
    assert made.data["sources"]["own"]["kept"] == 3
    rows = pq.read_table(out).to_pylist()[:3]
    assert [row["id"] for row in rows] == ["own-000001", "own-000002", "own-000003"]
    assert [json.loads(row["metadata"]).get("judge") for row in rows] == [None, True, True]
    assert rows[2]["question"].startswith("已知")
    assert made.data["steps"][2]["reasons"] == {"same": 3}  # their copies in the open set


def test_the_same_bytes_on_any_number_of_threads_and_anywhere(raw: Path, bench: Path, tmp_path: Path, monkeypatch) -> None:
    for module in (curation.ingest, curation.store):
        monkeypatch.setattr(module, "BATCH", 8)  # so that there is something to do at once
    found = []
    for threads in (1, 3):
        out = tmp_path / f"threads{threads}" / "prompts.parquet"
        curate([Source(raw)], [Source(bench)], Options(threads=threads), out)
        found.append(outputs(out))
    assert found[0] == found[1]


def test_a_finished_step_is_not_done_again_and_a_changed_option_is(raw: Path, bench: Path, tmp_path: Path, monkeypatch) -> None:
    out, work = tmp_path / "prompts.parquet", tmp_path / "work"
    ran: list[str] = []
    real = pipeline.steps_for

    def watched(benchmarks, options):
        def wrap(step):
            return pipeline.Step(
                step.name, step.title, step.options, lambda rows, progress: (ran.append(step.name), step.run(rows, progress))[1]
            )

        return [wrap(step) for step in real(benchmarks, options)]

    monkeypatch.setattr(pipeline, "steps_for", watched)
    names = ["decontaminate", "ground_truth", "exact", "fuzzy", "semantic", "question_type", "verifiable"]
    curate([Source(raw)], [Source(bench)], Options(threads=1), out, work)
    assert ran == names
    before, ran[:] = outputs(out), []
    curate([Source(raw)], [Source(bench)], Options(threads=2), out, work)
    assert ran == []
    assert outputs(out) == before
    curate([Source(raw)], [Source(bench)], Options(threads=1, fuzzy_threshold=0.7), out, work)
    assert ran == names[3:]
    ran[:] = []
    os.utime(raw, (1, 1))
    curate([Source(raw)], [Source(bench)], Options(threads=1, fuzzy_threshold=0.7), out, work)
    assert ran == names


def test_killed_and_started_again(raw: Path, bench: Path, tmp_path: Path) -> None:
    """SIGKILL once the exact step is finished: the second run goes on after it, and its output is an unkilled run's."""
    command = [sys.executable, "-m", "curation", str(raw), "--benchmark", str(bench), "--threads", "1"]
    out = tmp_path / "killed" / "prompts.parquet"
    killed = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = out.with_name(".prompts.parquet.work") / "03-exact"
    deadline = time.monotonic() + 60
    while not marker.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    assert marker.exists()
    again = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("from an earlier run") >= 4
    other = tmp_path / "whole" / "prompts.parquet"
    curate([Source(raw)], [Source(bench)], Options(threads=2), other)
    assert outputs(out) == outputs(other)
    assert not marker.parent.exists()


def test_a_step_that_fails_leaves_no_output_and_no_half_step(raw: Path, tmp_path: Path, monkeypatch) -> None:
    out, work = tmp_path / "prompts.parquet", tmp_path / "work"
    monkeypatch.setattr(pipeline, "remove_fuzzy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        curate([Source(raw)], [], Options(threads=1), out, work)
    assert not out.exists()
    assert sorted(path.name for path in work.iterdir() if path.suffix != ".part") == [
        "00-read",
        "01-decontaminate",
        "02-ground_truth",
        "03-exact",
        "lock",
    ]
    monkeypatch.undo()
    curate([Source(raw)], [], Options(threads=1), out, work)
    assert out.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    with path.open() as reader:
        with replacing(path) as part:
            part.write_text("newer")
        assert reader.read() == "new"  # another file under the same name: who reads the old one reads it to its end


def test_two_runs_do_not_share_a_work_folder(tmp_path: Path) -> None:
    first = Work(tmp_path / "work")
    with pytest.raises(InputError, match="in use by another curation"):
        Work(tmp_path / "work")
    first.close()
    Work(tmp_path / "work").close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        Work(tmp_path / "other")


def run(*arguments: object) -> str:
    """The error line of a failing command."""
    with pytest.raises(InputError) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)


def test_bad_options_and_files(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "o" / "p.parquet"
    assert "no raw file is named" in run("--out", out)
    assert "must end in .parquet" in run(raw, "--out", tmp_path / "p.json")
    assert "there is no such file" in run(tmp_path / "none.jsonl", "--out", out)
    assert "there is no such file" in run(raw, "--benchmark", tmp_path / "none.jsonl", "--out", out)
    assert "--fuzzy-threshold: 1.5 is out of range; give it 0.3 to 1.0" in run(raw, "--out", out, "--fuzzy-threshold", 1.5)
    assert "invalid choice" in run(raw, "--out", out, "--skip", "fuzy")
    assert "is not FIELD=COLUMN" in run(raw, "--out", out, "--map", "question")
    assert "is no folder" in run(raw, "--out", out, "--embedder", tmp_path / "none")
    assert "invalid int value" in run(raw, "--out", out, "--threads", "many")
    gb = tmp_path / "gb.jsonl"
    gb.write_bytes('{"question": "这是一个问题", "answer": "1"}\n'.encode("gb18030"))
    assert "iconv" in run(gb, "--out", out)
    nothing = write(tmp_path / "nothing.jsonl", [{"question": "a", "answer": float("nan")}] * 3)
    assert "none of its 3 rows can be used; the first: line 1: field answer: nan" in run(nothing, "--out", out)
    other = write(tmp_path / "other.jsonl", [{"frage": "a", "antwort": "1"}])
    assert "question or problem" in run(other, "--out", out)
    assert not out.parent.exists()  # a run that finished no step leaves nothing at all
    assert "no row has a question" in run(raw, "--benchmark", other, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == [".p.parquet.work"]  # the reading was finished, and is gone on with


def test_a_line_of_fifty_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text('{"question": "' + "x" * 50_000_000 + '", "answer": "1"}\n{"question": "What is 1+1?", "answer": "2"}\n')
    out = tmp_path / "out" / "p.parquet"
    assert main([str(path), "--out", str(out), "--quiet"]) == 0
    assert pq.read_table(out)["question"].to_pylist() == ["What is 1+1?"]
    quarantine = json.loads(out.with_name("p.quarantine.jsonl").read_text())
    assert quarantine["place"] == "line 1"
    assert "50,000,032 bytes" in quarantine["reason"]


def test_no_row_left_is_an_error_after_the_report(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.jsonl", [{"question": "Is it?", "answer": "yes"}])
    out = tmp_path / "p.parquet"
    assert "no row is left of 1" in run(raw, "--out", out, "--quiet")
    assert not out.exists()
    assert json.loads(out.with_name("p.report.json").read_text())["rows_kept"] == 0


def test_the_command_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curation", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "p.parquet"), "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == f"keju: error: {tmp_path / 'none.jsonl'}: there is no such file; check the path\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_map_and_name(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.jsonl", [{"frage": "Wie viel ist 2+3?", "antwort": {"wert": 5}}])
    out = tmp_path / "p.parquet"
    assert (
        main([f"school={raw}", "--map", "question=frage,answer=antwort.wert", "--out", str(out), "--quiet", "--skip", "semantic"])
        == 0
    )
    row = pq.read_table(out).to_pylist()[0]
    assert (row["id"], row["question"], row["answer"], row["source"]) == ("school-000001", "Wie viel ist 2+3?", "5", "school")


def test_the_trainer_reads_what_is_written(raw: Path, bench: Path, tmp_path: Path) -> None:
    """The border between the two: the trainer's own reader, which curation does not import."""
    prompts = pytest.importorskip("rollout.prompts")
    out = tmp_path / "prompts.parquet"
    curate([Source(raw)], [Source(bench)], Options(threads=1, solutions=True), out)
    found = prompts.read_prompts(out)
    assert len(found) == 40
    assert found[0].metadata == {"origin": "raw.jsonl:line 1"}


def test_parallel_map_keeps_the_order_and_does_not_run_ahead() -> None:
    taken: list[int] = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    def slow_first(number: int) -> int:
        time.sleep(0.02 if number % 7 == 0 else 0)
        return -number

    for threads in (1, 4):
        taken.clear()
        results = parallel_map(slow_first, items(), threads)
        assert next(results) == 0
        assert len(taken) <= 2 * threads
        assert list(results) == [-number for number in range(1, 50)]


def test_rows_across_batches(monkeypatch) -> None:
    """A table of several batches gives each row its own columns, whatever is left of it."""
    for module in (curation.ingest, curation.store):
        monkeypatch.setattr(module, "BATCH", 4)
    table = Rows(curation.ingest.table_of([(f"question {number}", str(number)) for number in range(11)]))
    assert len(table) == 11
    some = table.keep(np.isin(table.numbers, [0, 3, 4, 9, 10]))
    assert [frame["answer"].to_list() for frame in some.batches("answer")] == [["0", "3"], ["4"], ["9", "10"]]
    assert some.column("answer_value").tolist() == [0.0, 3.0, 4.0, 9.0, 10.0]
