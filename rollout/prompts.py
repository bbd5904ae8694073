"""The prompts file, and the order in which a run draws from it.

`read_prompts` checks everything once, where the data enters: after it, every prompt has a question and a ground truth, and ids
are unique. `PromptSource` is a pure order, keys(seed, epoch) sorted, and a cursor in it, so that a restarted run goes on with
the very prompt that the killed one would have drawn.

Left out: reading several files, streaming (a million prompts are a few GB at most), nested columns.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.errors import InputError
from rollout.types import Prompt

REQUIRED = ("question", "answer")
OPTIONAL = ("id", "solution", "source", "metadata")
SHOWN = 60
"""How many characters of a wrong value an error shows."""

Row = tuple[str, dict[str, Any]]
"""A place for error messages ("line 3", "row 3") and that row's columns."""


def read_prompts(path: Path, *, columns: dict[str, str] | None = None, answer_pattern: str | None = None) -> list[Prompt]:
    """All prompts of a `.jsonl` or `.parquet` file, in the file's order.

    columns: logical field (id, question, answer, solution, source, metadata) → the file's column; a field not named is looked for
    under its own name. question and answer must be there, and not blank. Without an id column the ids are `<file stem>-000001`,
    counted by line (JSONL, blank lines included) or row (Parquet).

    answer_pattern: a regular expression; the ground truth is its first group's first match in the answer field, stripped (GSM8K:
    `####\\s*(.+)$`). The whole field stays reachable as `solution` if columns maps solution to the same column.

    Raises InputError, one line, for whatever a user can mend: the file, a column, a line or row, a value, the pattern.
    """
    path = Path(path)
    columns = dict(columns or {})
    for field in columns:
        if field not in REQUIRED + OPTIONAL:
            raise InputError(
                f"{path}: columns maps {field!r}, which is no field of a prompt; {_nearest(field, REQUIRED + OPTIONAL)}"
            )
    pattern = _compile(path, answer_pattern)
    prompts, places = [], {}
    for number, place, row in _rows(path):
        reader = _RowReader(path, place, row, columns)
        prompt = reader.prompt(default_id=f"{path.stem}-{number:06d}", pattern=pattern)
        if prompt.id in places:
            raise reader.error("id", prompt.id, f"is also the id of {places[prompt.id]}; give each prompt its own")
        places[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: is empty; give it at least one prompt")
    return prompts


def as_metadata(value: Any, error: Callable[[str, Any, str], InputError]) -> dict[str, Any]:
    """A row's metadata: an object, or one written as JSON; {} for None. error: of a field, its value and the mend; raised."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as problem:
            why = getattr(problem, "msg", str(problem))
            raise error("metadata", value, f"is not JSON ({why}); make it a JSON object") from None
    if not isinstance(value, dict):
        raise error("metadata", value, f"is a {type(value).__name__}; make it a JSON object")
    return value


class _RowReader:
    """One row of the file, read field by field; every complaint names file, place and column."""

    def __init__(self, path: Path, place: str, row: dict[str, Any], columns: dict[str, str]) -> None:
        self.path, self.place, self.row, self.columns = path, place, row, columns

    def prompt(self, default_id: str, pattern: re.Pattern[str] | None) -> Prompt:
        answer = self.text("answer", required=True)
        return Prompt(
            id=self.identity(default_id),
            question=self.text("question", required=True),
            answer=answer if pattern is None else self.extract(answer, pattern),
            source=self.text("source") or "",
            solution=self.text("solution"),
            metadata=self.metadata(),
        )

    def error(self, field: str, value: Any, mend: str) -> InputError:
        column = self.columns.get(field, field)
        named = f"field {field}" if column == field else f"field {field} (column {column!r})"
        return InputError(f"{self.path}: {self.place}, {named}: {_short(value)} {mend}")

    def raw(self, field: str) -> Any:
        """The field's value; None where an optional field has no column. A column that the user named must exist."""
        column = self.columns.get(field, field)
        if column in self.row:
            return self.row[column]
        if field in REQUIRED or field in self.columns:
            mend = f"{_nearest(column, self.row)}, or map the field with data.columns.{field}=COLUMN"
            raise InputError(f"{self.path}: {self.place}, field {field}: there is no column {column!r}; {mend}")
        return None

    def text(self, field: str, required: bool = False) -> str | None:
        value = self.raw(field)
        if value is None and not required:
            return None
        if value is None:
            raise self.error(field, value, "is missing; give it a text")
        if isinstance(value, float) and math.isnan(value):
            raise self.error(field, value, "is NaN; give it a text, or drop the row")
        if not isinstance(value, str):
            raise self.error(field, value, f"is a {type(value).__name__}; make it a text (in quotes)")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise self.error(field, value, "has half a surrogate pair, which no tokenizer takes; write the character whole")
        if required and not value.strip():
            raise self.error(field, value, "is blank; fill it in, or drop the row")
        return value

    def identity(self, default_id: str) -> str:
        value = self.raw("id")
        if value is None and "id" not in self.row and "id" not in self.columns:
            return default_id
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error("id", value, "is no id; make it a text or a whole number, not blank")
        return value

    def metadata(self) -> dict[str, Any]:
        value = as_metadata(self.raw("metadata"), self.error)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(
                "metadata", value, f"does not go into JSON ({error}); use texts, finite numbers, lists, objects"
            ) from None
        return value

    def extract(self, answer: str, pattern: re.Pattern[str]) -> str:
        found = pattern.search(answer)
        extracted = found.group(1) if found else None
        if not extracted or not extracted.strip():
            raise self.error(
                "answer", answer, f"has nothing for the answer pattern {pattern.pattern!r}; mend the pattern or the row"
            )
        return extracted.strip()


def _rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number from 1, place for messages, columns) of each row."""
    try:
        there = path.exists()
    except OSError as error:
        raise InputError(f"{_short(str(path))}: cannot be looked at ({error.strerror}); check the path") from None
    if not there:
        raise InputError(f"{path}: there is no such file; check the path")
    if not path.is_file():
        raise InputError(f"{path}: is not a file; name one .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise InputError(f"{path}: the suffix {path.suffix!r} is unknown; give a .jsonl or a .parquet file")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            # Some editors put a byte order mark in front of the first line; it carries nothing.
            body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = len(line) - len(body) + error.start
                raise InputError(
                    f"{path}: {place}, byte {byte + 1}: 0x{line[byte]:02x} is not UTF-8; save the file as UTF-8"
                ) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                # Beside JSONDecodeError: a number of more than 4300 digits (ValueError), brackets without end (RecursionError).
                why, position = getattr(error, "msg", str(error)), getattr(error, "pos", 0)
                shown = _short(text[max(0, position - 20) :].rstrip("\r\n"))
                raise InputError(
                    f"{path}: {place}, character {position + 1}: {shown} is not JSON ({why}); write one object a line"
                ) from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: {place}: {_short(row)} is a {type(row).__name__}; write one JSON object a line")
            yield number, place, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"row {number}", row
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: after row {number}: a text is not UTF-8 ({error.reason}); write the file again as UTF-8"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is not a readable Parquet file ({first_line}); write it again") from None


def _compile(path: Path, answer_pattern: str | None) -> re.Pattern[str] | None:
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise InputError(f"{path}: the answer pattern {answer_pattern!r} is no regular expression ({error}); mend it") from None
    if not pattern.groups:
        raise InputError(f"{path}: the answer pattern {answer_pattern!r} has no group; put the answer in (…)")
    return pattern


def _nearest(name: str, existing: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(existing), n=1, cutoff=0.5)
    return f"the nearest is {close[0]!r}" if close else f"there are {_short(', '.join(existing))}"


def _short(value: Any) -> str:
    """The value on one line, at most SHOWN characters."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"


class PromptSource:
    """Endless draws from the prompts: each exactly once an epoch, in an order that is a pure function of (seed, epoch).

    The order sorts 64-bit keys from Philox(SeedSequence([seed, epoch])). NumPy promises that these raw streams stay the same
    between its versions, and does not promise it for `Generator.permutation`.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """prompts: at least one; seed: 0 or more. Raises ValueError otherwise."""
        if not prompts:
            raise ValueError("PromptSource needs at least one prompt")
        if seed < 0:
            raise ValueError(f"the seed is {seed}; it must be 0 or more")
        self._prompts = tuple(prompts)
        self._digest = _digest([prompt.id for prompt in self._prompts])
        self._content = _digest([[prompt.id, prompt.question, prompt.answer] for prompt in self._prompts])
        self._move(seed, epoch=0, position=0)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them, in the file's order."""
        return self._prompts

    def draw(self, n: int) -> list[Prompt]:
        """The next n ≥ 0 prompts; one call may reach into the next epoch, or over several. Raises ValueError where n < 0."""
        if n < 0:
            raise ValueError(f"cannot draw {n} prompts")
        drawn: list[Prompt] = []
        while len(drawn) < n:
            if self._position == len(self._prompts):
                self._move(self._seed, self._epoch + 1, position=0)
            taken = self._order[self._position : self._position + n - len(drawn)]
            drawn.extend(self._prompts[index] for index in taken)
            self._position += len(taken)
        return drawn

    def state(self) -> dict[str, Any]:
        """The cursor, JSON-able: seed, epoch (from 0), position (prompts drawn in this epoch), the data's count, and digests of
        its ids and of its ids, questions and answers."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "count": len(self._prompts),
            "digest": self._digest,
            "content": self._content,
        }

    def is_of(self, state: dict[str, Any]) -> bool:
        """Whether `state` is a cursor over these very prompts, whatever their file is called. Ids alone do not tell: where a file
        has none they are numbers."""
        return self._has_ids(state) and state.get("content", self._content) == self._content

    def _has_ids(self, state: dict[str, Any]) -> bool:
        return (state.get("count"), state.get("digest")) == (len(self._prompts), self._digest)

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with its seed. Raises InputError, and changes nothing, where the state was taken from
        other prompts (number or ids) or is no such state."""
        for name in ("seed", "epoch", "position", "count"):
            value = state.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(
                    f"prompt cursor, field {name}: {_short(value)} is no whole number of 0 or more; take another checkpoint"
                )
        if not self._has_ids(state):
            raise InputError(
                f"prompt cursor: it was saved over other prompts ({state['count']}, digest {_short(state.get('digest'))}) than "
                f"are read now ({len(self._prompts)}, digest {self._digest!r}); give the run its old prompts file, or start anew"
            )
        if state["position"] > state["count"]:
            raise InputError(
                f"prompt cursor, field position: {state['position']} is beyond {state['count']} prompts; take another checkpoint"
            )
        self._move(state["seed"], state["epoch"], state["position"])

    def _move(self, seed: int, epoch: int, position: int) -> None:
        keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(len(self._prompts))
        self._order = np.argsort(keys, kind="stable").tolist()
        self._seed, self._epoch, self._position = seed, epoch, position


def _digest(texts: Sequence[Any]) -> str:
    """16 hexadecimal digits over texts in the file's order. JSON keeps ["a,b"] and ["a", "b"] apart."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
