"""Outputs with their ground truths out of a file of anybody's making (JSONL, JSON, Parquet, CSV), for a trial of the reward.

A row has one output or a list of them. Fields are found by their usual names, or mapped to a column or a path into one
(`output=choices.0.text`). Every value is checked: what a user can mend is an InputError that names file, line, field and value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation import readers
from curation.errors import InputError as FileError
from curation.errors import shown
from curation.fields import first
from rollout.errors import InputError
from rollout.prompts import as_metadata
from rollout.types import FinishReason, Prompt

NAMES = {
    "output": ("output", "outputs", "response", "responses", "completion", "completions", "generation", "generations", "code"),
    "answer": ("answer", "gold", "gt", "ground_truth", "target", "reference"),
    "question": ("question", "problem", "prompt", "query"),
    "id": ("id", "uid", "idx"),
    "source": ("source", "dataset", "data_source"),
    "finish_reason": ("finish_reason", "finish_reasons", "stop_reason"),
    "metadata": ("metadata",),
}
"""Field → columns that it is looked for under, in this order."""
REQUIRED = ("output", "answer")
_TRUNCATED = ("length", "max_tokens")


@dataclass(frozen=True, slots=True)
class Output:
    """One output. row: the id of its row; index: which of the row's outputs."""

    row: str
    index: int
    text: str
    prompt: Prompt
    finish_reason: FinishReason


Fields = Mapping[str, tuple[str, ...]]
"""Field → columns or paths, of which the first that leads to something counts."""


def find_fields(path: Path, mapped: Mapping[str, str]) -> Fields:
    """What the user says (`mapped`), else the first usual name that the file's first row has. A field that this row lacks may
    come in a later one, under any of its names.

    Raises InputError for a file that cannot be read, an unknown field, a required field that is neither mapped nor found, and a
    column that is not there.
    """
    for field in mapped:
        if field not in NAMES:
            raise InputError(f"--map: {field!r} is no field; {_nearest(field, NAMES)}")
    place, row = next(_rows(path), ("", None))
    if row is None:
        raise InputError(f"{path}: is empty; give it at least one row")
    found = {}
    for field, names in NAMES.items():
        if field in mapped:
            if first(row, (mapped[field],)) is None and mapped[field].split(".")[0] not in row:
                raise InputError(
                    f"{path}: {place}, field {field}: there is no column {mapped[field]!r}; {_nearest(mapped[field], row)}"
                )
            found[field] = (mapped[field],)
        elif name := next((name for name in names if name in row), None):
            found[field] = (name,)
        elif field not in REQUIRED:
            found[field] = names
        else:
            raise InputError(
                f"{path}: {place}, field {field}: no column of a usual name; write --map {field}=COLUMN "
                f"(columns: {', '.join(map(str, row))[:200]})"
            )
    return found


def read_outputs(path: Path, fields: Fields) -> Iterator[Output]:
    """All outputs, in the file's order. fields: `find_fields`'s. Raises InputError at the first value that is not as it should
    be."""
    for number, (place, row) in enumerate(_rows(path), start=1):
        yield from _Row(path, place, row, fields).outputs(f"{path.stem}-{number:06d}")


class _Row:
    """One row, read field by field."""

    def __init__(self, path: Path, place: str, row: dict[str, Any], fields: Fields) -> None:
        self.path, self.place, self.row, self.fields = path, place, row, fields

    def outputs(self, default_id: str) -> Iterator[Output]:
        texts = self.texts()
        name = self.identity(default_id)
        prompt = Prompt(name, self.optional_text("question"), self.answer(), self.optional_text("source"), None, self.metadata())
        for index, (text, finish) in enumerate(zip(texts, self.finish_reasons(len(texts)), strict=True)):
            yield Output(name, index, text, prompt, finish)

    def error(self, field: str, value: Any, mend: str) -> InputError:
        column = next((name for name in self.fields[field] if name in self.row), self.fields[field][0])
        named = f"field {field}" if column == field else f"field {field} (column {column!r})"
        return InputError(f"{self.path}: {self.place}, {named}: {shown(value)} {mend}")

    def value(self, field: str) -> Any:
        value = first(self.row, self.fields[field])
        if isinstance(value, float) and math.isnan(value):
            raise self.error(field, value, "is NaN; give it a value, or drop the row")
        if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise self.error(field, value, "has half a surrogate pair, which no tokenizer takes; write the character whole")
        return value

    def texts(self) -> list[str]:
        value = self.value("output")
        if value is None:
            raise self.error("output", value, "is missing; give it a text or a list of texts, or drop the row")
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise self.error("output", text, f"is a {type(text).__name__}; make it a text or a list of texts")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise self.error("output", text, "has half a surrogate pair, which no tokenizer takes; write the character whole")
        if not texts:
            raise self.error("output", value, "has no output; give it at least one, or drop the row")
        return texts

    def answer(self) -> str:
        value = self.value("answer")
        if value is None:
            raise self.error("answer", value, "is missing; fill it in, or drop the row")
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error("answer", value, f"is a {type(value).__name__}; make it a text or a number, or drop the row")
        if not value.strip():
            raise self.error("answer", value, "is blank; fill it in, or drop the row")
        return value

    def optional_text(self, field: str) -> str:
        value = self.value(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(field, value, f"is a {type(value).__name__}; make it a text, or map the field elsewhere")
        return value

    def identity(self, default_id: str) -> str:
        value = self.value("id")
        if value is None:
            return default_id
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error("id", value, f"is a {type(value).__name__}; make it a text or a whole number")
        return str(value)

    def finish_reasons(self, count: int) -> list[FinishReason]:
        value = self.value("finish_reason")
        reasons = value if isinstance(value, list) else [value] * count
        if len(reasons) != count or not all(reason is None or isinstance(reason, str) for reason in reasons):
            raise self.error("finish_reason", value, f"does not go with {count} outputs; give it a text, or one for each")
        return ["length" if reason in _TRUNCATED else "stop" for reason in reasons]

    def metadata(self) -> dict[str, Any]:
        return as_metadata(self.value("metadata"), self.error)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for place, row in readers.rows(path):
            if isinstance(row, readers.Broken):
                raise InputError(f"{path}: {place}: {row.reason}")
            if not isinstance(row, dict):
                raise InputError(f"{path}: {place}: {shown(row)} is a {type(row).__name__}; write one JSON object a row")
            yield place, row
    except FileError as error:
        raise InputError(str(error)) from None


def _nearest(name: str, existing: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(existing), n=1, cutoff=0.5)
    return f"the nearest is {close[0]!r}" if close else f"there are {', '.join(map(str, existing))[:200]}"
