"""The prompts file (every wrong input is one line that names its place) and the order of draws (pure, exact over a restart)."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import InputError
from rollout.prompts import PromptSource, read_prompts
from rollout.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / os.environ.get("KEJU_TEST_DATA", "../shared/data")
GSM8K_ANSWER = r"####\s*(.+)$"


def write(path: Path, *rows: dict | str | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def complaint(path: Path, **arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text, "an error is one line"
    assert str(path) in text, "an error names the file"
    return text


def test_jsonl_with_every_field(tmp_path):
    row = {
        "id": 7,
        "question": "1+1?",
        "answer": "2",
        "solution": "count",
        "source": "mine",
        "metadata": '{"a": [1, null]}',
        "other": 3,
    }
    assert read_prompts(write(tmp_path / "p.jsonl", row)) == [Prompt("7", "1+1?", "2", "mine", "count", {"a": [1, None]})]


def test_ids_come_from_lines_and_blank_lines_count(tmp_path):
    row = {"question": "q", "answer": "1,000", "source": None, "solution": None, "metadata": None}
    prompts = read_prompts(write(tmp_path / "set.jsonl", b"\xef\xbb\xbf" + json.dumps(row).encode(), "", row))
    assert [prompt.id for prompt in prompts] == ["set-000001", "set-000003"]
    assert prompts[0] == Prompt("set-000001", "q", "1,000")


def test_parquet_equals_jsonl(tmp_path):
    rows = [{"key": f"k{i}", "q": f"题 {i}", "a": str(i), "metadata": {"n": i}} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    columns = {"id": "key", "question": "q", "answer": "a"}
    from_parquet = read_prompts(tmp_path / "p.parquet", columns=columns)
    assert from_parquet == read_prompts(write(tmp_path / "p.jsonl", *rows), columns=columns)
    assert len(from_parquet) == 2500
    assert from_parquet[2000].metadata == {"n": 2000}


def test_answer_pattern_keeps_the_whole_field_as_solution(tmp_path):
    path = write(tmp_path / "p.jsonl", {"question": "q", "answer": "first …\n#### 1,000 "})
    (prompt,) = read_prompts(path, columns={"solution": "answer"}, answer_pattern=GSM8K_ANSWER)
    assert (prompt.answer, prompt.solution) == ("1,000", "first …\n#### 1,000 ")


GOOD = {"question": "q", "answer": "1"}
WRONG_ROWS = {
    "blank answer": ({"question": "q", "answer": " \t"}, ["line 2", "field answer", "blank"]),
    "blank question": ({"question": "", "answer": "1"}, ["line 2", "field question", "blank"]),
    "null answer": ({"question": "q", "answer": None}, ["line 2", "field answer", "None", "missing"]),
    "number for a text": ({"question": "q", "answer": 72}, ["line 2", "field answer", "72", "int"]),
    "NaN": ('{"question": "q", "answer": NaN}', ["line 2", "field answer", "NaN"]),
    "NaN in metadata": ('{"question": "q", "answer": "1", "metadata": {"x": NaN}}', ["line 2", "field metadata", "JSON"]),
    "metadata no object": ({**GOOD, "metadata": "[1]"}, ["line 2", "field metadata", "list"]),
    "metadata no JSON": ({**GOOD, "metadata": "{a}"}, ["line 2", "field metadata", "not JSON"]),
    "missing column": ({"question": "q", "answr": "1"}, ["line 2", "'answer'", "'answr'"]),
    "not JSON": ('{"question": "q", "answer": }', ["line 2", "character 29", "not JSON"]),
    "not an object": ("[1, 2]", ["line 2", "list"]),
    "not UTF-8": (b'{"question": "caf\xe9", "answer": "1"}', ["line 2", "byte 18", "0xe9"]),
    "half a surrogate pair": ('{"question": "\\ud83d", "answer": "1"}', ["line 2", "field question", "surrogate"]),
    "endless number": ('{"question": "q", "answer": ' + "9" * 5000 + "}", ["line 2", "not JSON"]),
    "nested without end": ("[" * 100000, ["line 2", "not JSON"]),
    "boolean id": ({**GOOD, "id": True}, ["line 2", "field id", "True"]),
    "null id": ({**GOOD, "id": None}, ["line 2", "field id", "None"]),
    "solution no text": ({**GOOD, "solution": ["s"]}, ["line 2", "field solution", "list"]),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_row_is_one_line_with_its_place(tmp_path, name):
    row, named = WRONG_ROWS[name]
    text = complaint(write(tmp_path / "p.jsonl", GOOD, row))
    assert all(part in text for part in named), text


def test_long_values_are_shortened(tmp_path):
    assert len(complaint(write(tmp_path / "p.jsonl", {"question": "q", "answer": ["long\n" * 1000]}))) < 300 + len(str(tmp_path))


def test_duplicate_id_names_both_lines(tmp_path):
    text = complaint(write(tmp_path / "p.jsonl", {**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}))
    assert "line 3" in text
    assert "line 1" in text


def test_wrong_files(tmp_path):
    assert "no such file" in complaint(tmp_path / "none.jsonl")
    assert "empty" in complaint(write(tmp_path / "empty.jsonl", ""))
    assert "'.csv'" in complaint(write(tmp_path / "p.csv", GOOD))
    assert "is not a file" in complaint(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet PAR1")
    assert "Parquet" in complaint(tmp_path / "bad.parquet")
    (tmp_path / "zero.parquet").touch()
    assert "Parquet" in complaint(tmp_path / "zero.parquet")
    pq.write_table(pa.table({"question": ["q", "q"], "answer": ["1", None]}), tmp_path / "null.parquet")
    assert "row 2, field answer" in complaint(tmp_path / "null.parquet")
    pq.write_table(pa.table({"question": ["q"], "answer": [float("nan")]}), tmp_path / "nan.parquet")
    assert "row 1, field answer: nan is NaN" in complaint(tmp_path / "nan.parquet")


def test_wrong_columns_and_patterns(tmp_path):
    path = write(tmp_path / "p.jsonl", GOOD)
    assert "'answer'" in complaint(path, columns={"anser": "a"})
    assert "the nearest is 'question'" in complaint(path, columns={"question": "questions"})
    assert "field solution" in complaint(path, columns={"solution": "steps"}), "a column that was named must exist"
    assert "no group" in complaint(path, answer_pattern="####")
    assert "no regular expression" in complaint(path, answer_pattern="(")
    text = complaint(path, answer_pattern=GSM8K_ANSWER)
    assert "line 1, field answer" in text
    assert repr(GSM8K_ANSWER) in text


def test_gsm8k_reads_completely():
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.exists():
        pytest.skip(f"no test data at {path} (set KEJU_TEST_DATA)")
    prompts = read_prompts(path, columns={"solution": "answer"}, answer_pattern=GSM8K_ANSWER)
    assert len(prompts) == 7473
    assert prompts[0].id == "train-000001"
    assert (prompts[0].answer, prompts[0].solution[-7:]) == ("72", "#### 72")
    assert sum("," in prompt.answer for prompt in prompts) > 50, "1,000 stays as it is"
    assert not any("#" in prompt.answer or "\n" in prompt.answer for prompt in prompts)


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(f"id-{i}", "q", "a") for i in range(count)]


@given(st.integers(1, 30), st.integers(0, 2**40), st.lists(st.integers(0, 70), max_size=6))
def test_draws_are_equal_over_a_restart_and_each_prompt_comes_once_an_epoch(count, seed, sizes):
    """Saved and restored before each draw, through JSON and into a source of another seed: the same prompts."""
    prompts, total = prompts_of(count), sum(sizes)
    whole = PromptSource(prompts, seed).draw(total)
    source, pieces = PromptSource(prompts, seed), []
    for size in sizes:
        state = json.loads(json.dumps(source.state()))
        source = PromptSource(prompts, seed=1)
        source.load(state)
        pieces += source.draw(size)
    assert pieces == whole
    for start in range(0, total - count + 1, count):
        assert {prompt.id for prompt in whole[start : start + count]} == {prompt.id for prompt in prompts}


def test_order_depends_on_seed_and_epoch():
    first, second = PromptSource(prompts_of(50), seed=0), PromptSource(prompts_of(50), seed=1)
    epochs = [first.draw(50), first.draw(50), second.draw(50)]
    ids = {tuple(prompt.id for prompt in epoch) for epoch in epochs}
    assert len(ids) == 3
    assert tuple(prompt.id for prompt in prompts_of(50)) not in ids


def test_order_is_frozen():
    """A checkpoint outlives the library versions that wrote it: this order may never change."""
    assert [prompt.id for prompt in PromptSource(prompts_of(6), seed=3).draw(12)] == FROZEN


FROZEN = [f"id-{i}" for i in (0, 1, 2, 5, 4, 3, 5, 3, 0, 1, 2, 4)]


def test_state_of_other_prompts_is_refused():
    source = PromptSource(prompts_of(5), seed=0)
    state = source.state()
    other_ids = PromptSource([*prompts_of(4), Prompt("new", "q", "a")], seed=0)
    other_order = PromptSource(prompts_of(5)[::-1], seed=0)
    for other in (PromptSource(prompts_of(6), seed=0), other_ids, other_order):
        before = other.state()
        with pytest.raises(InputError, match="other prompts"):
            other.load(state)
        assert other.state() == before
    for broken in ({}, {**state, "position": 6}, {**state, "epoch": -1}, {**state, "seed": "0"}, {**state, "position": None}):
        with pytest.raises(InputError, match="prompt cursor"):
            source.load(broken)
    with pytest.raises(ValueError, match="at least one"):
        PromptSource([], seed=0)
