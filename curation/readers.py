"""Rows out of JSONL, JSON, Parquet and CSV files, one at a time.

What is wrong with the file (missing, empty, packed, another encoding throughout) is an InputError; what is wrong with one row
is a `Broken` in its place, and the reading goes on. No reader holds more than one row, one line of at most `LINE_LIMIT` bytes
or, for Parquet, one batch.

Left out: compressed text files, Excel, HTML tables.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import InputError, shown

LINE_LIMIT = 8 * 2**20
"""Bytes of a line. A whole question with its solution is some kilobytes; a line of 50 MB is a file that lost its line ends."""
_PEEK = 1 << 16
_BATCH = 2048
_UTF8 = "convert the file to UTF-8, say: iconv -f GB18030 -t UTF-8"


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read. reason: what is wrong, and the mend."""

    reason: str


Row = tuple[str, Any]
"""("line 3" or "row 3", the row: a dict, a list or a Broken)."""


def rows(path: Path, columns: set[str] | None = None) -> Iterator[Row]:
    """All rows of a file, by its suffix. columns: the top-level columns of interest (a saving for Parquet alone; None: all).

    Raises InputError for a file that is missing, no file, empty, packed, not UTF-8 as a whole, or no JSON, CSV or Parquet.
    """
    kind = _check(path)
    try:
        if kind == "parquet":
            yield from _parquet(path, columns)
        elif kind == "csv":
            yield from _csv(path)
        elif kind == "jsonl":
            yield from _jsonl(path)
        else:
            yield from _json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file and its rights") from None


def first_row(path: Path) -> Any:
    """The first row that can be read; None where there is none among the first 1000."""
    return next((row for _, row in itertools.islice(rows(path), 1000) if not isinstance(row, Broken)), None)


def _check(path: Path) -> str:
    """The file's kind: parquet, csv, jsonl, json. Raises InputError for whatever can be seen in its name and first bytes."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file; check the path")
    if not path.is_file():
        raise InputError(f"{path}: is not a file; name one .jsonl, .json, .parquet or .csv file")
    try:
        with path.open("rb") as file:
            head = file.read(_PEEK)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    if not head.strip():
        raise InputError(f"{path}: is empty; give it rows, or leave the file out")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: is UTF-16 (it begins with {head[:2]!r}); convert it: iconv -f UTF-16 -t UTF-8")
    if head[:2] == b"\x1f\x8b" or head[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd"):
        raise InputError(f"{path}: is a compressed file (it begins with {head[:4]!r}); unpack it first")
    if head[:4] == b"PAR1":
        return "parquet"
    suffix = path.suffix.casefold()
    if suffix == ".parquet":
        raise InputError(f"{path}: is no Parquet file (it begins with {head[:4]!r}, not PAR1); give it its right suffix")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json":
        return "jsonl" if _looks_like_lines(head) else "json"
    raise InputError(f"{path}: the suffix {path.suffix!r} is unknown; give a .jsonl, .json, .parquet or .csv file")


def _looks_like_lines(head: bytes) -> bool:
    """JSON lines under the suffix .json: the first line is one whole object, and another begins on the next."""
    line, end, rest = head.lstrip(b"\xef\xbb\xbf").partition(b"\n")
    if not end or not line.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return not rest.strip() or rest.lstrip().startswith(b"{")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | Broken]]:
    """(number from 1, line without its end). A line beyond the limit is read past in pieces, never held."""
    number = 0
    while line := file.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            size = len(line)
            while (piece := file.readline(LINE_LIMIT)) and not piece.endswith(b"\n"):
                size += len(piece)
            has = f"the line has {size + len(piece):,} bytes, at most {LINE_LIMIT:,} may make a row"
            yield number, Broken(f"{has}; put each row on a line of its own")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.rstrip(b"\r\n")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in _lines(file):
            place = f"line {number}"
            if isinstance(line, Broken):
                yield place, line
            elif line.strip():
                yield place, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken(f"is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}); {_UTF8}")
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", str(error))
        return Broken(f"is not JSON ({why}): {shown(line.decode(errors='replace'))}; mend or drop the line")
    if not isinstance(value, dict | list):
        return Broken(f"is a {type(value).__name__} ({shown(value)}), not an object; write {{…}} on each line")
    return value


def _json(path: Path) -> Iterator[Row]:
    """An array of rows, an object that holds one (GAOKAO-Bench's "example"), or objects one after another (Math23K)."""
    read = 0
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        start = file.tell()
        try:
            prefix = _json_prefix(file)
            file.seek(start)
            for value in ijson.items(file, prefix, use_float=True, multiple_values=prefix == ""):
                read += 1
                good = isinstance(value, dict | list)
                yield f"row {read}", value if good else Broken(f"is a {type(value).__name__}, not an object; write {{…}}")
        except UnicodeDecodeError:
            raise InputError(f"{path}: row {read + 1}: is not UTF-8; {_UTF8}") from None
        except ijson.JSONError as error:
            why = " ".join(str(error).split())[:120]
            mend = _UTF8 if "UTF" in why.upper() else "mend the file there (NaN is no JSON), or give JSON lines as .jsonl"
            raise InputError(f"{path}: row {read + 1}: is not JSON ({why}); {mend}") from None


def _json_prefix(file: BinaryIO) -> str:
    """ijson's name for the rows: "item" in an array, "KEY.item" in an object with an array of objects, else "" (the values)."""
    key = None
    for prefix, event, _ in ijson.parse(file, use_float=True, multiple_values=True):
        if prefix == "" and event == "start_array":
            return "item"
        if key is not None and event in ("start_map", "start_array"):
            return f"{key}.item"
        key = prefix if event == "start_array" and prefix and "." not in prefix else None
        if prefix == "" and event == "end_map":
            return ""
    return ""


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    with path.open("rb") as file:
        head = file.read(_PEEK)
        file.seek(0)
        delimiter = (
            "\t"
            if path.suffix.casefold() == ".tsv" or head.partition(b"\n")[0].count(b"\t") > head.partition(b"\n")[0].count(b",")
            else ","
        )
        reader = csv.reader(_csv_lines(path, file), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, Broken(f"is no CSV ({error}); mend the quotes or drop the line")
                continue
            if not names:
                names = [name.strip() for name in fields]
            elif len(fields) != len(names):
                if fields:
                    yield place, Broken(f"has {len(fields)} fields where the header has {len(names)}; mend the commas or quotes")
            else:
                yield place, dict(zip(names, (field or None for field in fields), strict=True))


def _csv_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Lines for the csv module. A byte that is no UTF-8 becomes half a surrogate pair, which the field map turns away by row."""
    for number, line in _lines(file):
        if isinstance(line, Broken):
            raise InputError(f"{path}: line {number}: {line.reason}")
        yield line.decode("utf-8", "surrogateescape") + "\n"


def _parquet(path: Path, columns: set[str] | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            number = 0
            for batch in file.iter_batches(_BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: is no readable Parquet file ({why}); write it anew") from None


def check_types(path: Path, column: str) -> None:
    """Raises InputError where a Parquet file's question column can hold no text (numbers, bytes): each row would be turned
    away."""
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            return
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, io.UnsupportedOperation):
        return  # reading the rows says it better
    if column not in schema.names:
        return
    kind = schema.field(column).type
    text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_dictionary(kind)
    )
    if not text and not pa.types.is_nested(kind):
        names = ", ".join(schema.names[:12])
        raise InputError(
            f"{path}: field question (column {column!r}): holds {kind}, not text; write --map question=… (columns: {names})"
        )
