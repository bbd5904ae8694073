"""Each format as found in the wild; what is broken in a row is that row's trouble, what is broken in the file is one line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import readers
from curation.errors import InputError
from curation.readers import Broken, rows

TWO = [{"question": "a", "answer": "1"}, {"question": "乙", "answer": "2"}]


def read(path: Path) -> list:
    return [row for _, row in rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n\n".join(json.dumps(row) for row in TWO)),
        ("a.json", json.dumps(TWO, indent=2)),
        ("a.json", json.dumps({"keywords": "k", "example": TWO})),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in TWO)),
        ("a.json", "\n".join(json.dumps(row) for row in TWO)),
        ("a.csv", "question,answer\na,1\n乙,2\n"),
        ("a.tsv", "question\tanswer\na\t1\n乙\t2\n"),
        ("a.csv", '"question","answer"\r\n"a","1"\r\n"乙","2"\r\n'),
        ("a.jsonl", "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in TWO)),
        ("a.json", "\ufeff" + json.dumps(TWO)),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read(path) == TWO


def test_parquet_reads_only_the_columns_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"long": "x"} for row in TWO]), path)
    assert [row for _, row in rows(path, {"question", "answer", "absent"})] == TWO


def test_a_broken_line_does_not_stop_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n"text"\n\xb5\xc4\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    found = list(rows(path))
    assert [place for place, _ in found] == [f"line {number}" for number in (1, 2, 3, 4, 5, 6)]
    assert [isinstance(row, Broken) for _, row in found] == [False, True, True, True, True, False]
    assert "iconv" in found[3][1].reason
    assert all(len(row.reason) < 250 for _, row in found if isinstance(row, Broken))


def test_an_endless_line_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    path = tmp_path / "a.jsonl"
    for length in (999, 1000, 1001, 2000, 5000):
        path.write_text('{"a": 1}\n' + "x" * length + '\n{"a": 2}\n')
        found = read(path)
        assert [found[0], found[-1], len(found)] == [{"a": 1}, {"a": 2}, 3]
        assert isinstance(found[1], Broken)
        if length >= 1000:
            assert f"{length:,}" in found[1].reason or f"{length + 1:,}" in found[1].reason


def test_csv_rows_with_other_widths_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n"1,5",2\nx\ny,2,3\n"multi\nline",4\n,5\n')
    found = read(path)
    assert found[0] == {"q": "1,5", "a": "2"}
    assert isinstance(found[1], Broken)
    assert isinstance(found[2], Broken)
    assert found[3] == {"q": "multi\nline", "a": "4"}
    assert found[4] == {"q": None, "a": "5"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n ", "is empty"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "compressed"),
        ("a.parquet", b"question,answer", "no Parquet"),
        ("a.parquet", b"PAR1 and nothing else", "no readable Parquet"),
        ("a.xlsx", b"abc", "suffix"),
        ("a.json", b'[{"a": 1}, {"a": ', "row 2"),
        ("a.json", b'[{"a": 1}, {"a": NaN}]', "NaN is no JSON"),
        ("a.json", '[{"a": "乙"}]'.encode("gb18030"), "UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_with_its_mend(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert ";" in message
    assert len(message) < len(str(path)) + 300


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="not a file"):
        read(tmp_path)


def test_a_parquet_column_of_the_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": [1, 2], "answer": ["1", "2"]}), path)
    with pytest.raises(InputError, match=r"field question \(column 'question'\): holds int64"):
        readers.check_types(path, "question")
