"""Rows on disk, read through memory maps, and the work folder in which finished steps outlive a kill.

`Rows` is the table that the steps pass on: one Arrow file, written once, and the ascending numbers of the rows still in it. A
step takes a Rows and gives an `Outcome`: the Rows that stay, and each row removed with its reason. Nothing is copied but
numbers; texts come in batches of `BATCH` rows and are forgotten again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from curation.errors import InputError

BATCH = 16_384
"""Rows of a record batch of the Arrow file."""

_TEXTS = ("id", "source", "question", "answer", "solution", "metadata", "kind", "unfit", "flags", "key")
_HASHES = ("exact", "exact2", "answer_hash", "answer_numbers", "content", "numbers")
COLUMNS = pa.schema(
    [
        *((name, pa.large_string()) for name in _TEXTS),
        *((name, pa.uint64()) for name in _HASHES),
        ("answer_value", pa.float64()),
        ("exempt", pa.bool_()),
    ]
)
"""exact, exact2: two independent hashes of the question's tokens, equal for equal questions. answer_value: the answer as a
number, NaN where it is none; answer_hash: of its tokens; answer_numbers: of its digits, 0 without. A multiple-choice letter
stands for the text of its option there. content: of the question's numbers and operators, in any order; numbers: of its digits
alone."""

Item, Result = TypeVar("Item"), TypeVar("Result")


class Rows:
    """Some rows of an Arrow file. numbers: int64, ascending, the rows' places in the file."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader, numbers: np.ndarray | None = None) -> None:
        self._reader = reader
        batches = reader.num_record_batches
        total = (batches - 1) * BATCH + reader.get_batch(batches - 1).num_rows if batches else 0
        self.numbers = np.arange(total) if numbers is None else numbers

    @classmethod
    def open(cls, path: Path) -> Rows:
        return cls(pa.ipc.open_file(pa.memory_map(str(path))))

    def __len__(self) -> int:
        return len(self.numbers)

    def keep(self, mask: np.ndarray) -> Rows:
        """Those that the mask bool[len] leaves."""
        return Rows(self._reader, self.numbers[mask])

    def at(self, numbers: np.ndarray) -> Rows:
        """The rows of the file with these ascending numbers."""
        return Rows(self._reader, np.asarray(numbers, np.int64))

    def batches(self, *columns: str) -> Iterator[pl.DataFrame]:
        """The rows in order, at most BATCH at a time, with these columns."""
        for number in range(self._reader.num_record_batches):
            low, high = np.searchsorted(self.numbers, (number * BATCH, (number + 1) * BATCH))
            if low == high:
                continue
            batch = self._reader.get_batch(number).select(columns)
            if high - low < batch.num_rows:
                batch = batch.take(pa.array(self.numbers[low:high] - number * BATCH))
            yield pl.from_arrow(pa.Table.from_batches([batch]))

    def column(self, name: str) -> np.ndarray:
        """One column of plain numbers (or bools), whole."""
        parts = [frame[name].to_numpy() for frame in self.batches(name)]
        return np.concatenate(parts) if parts else np.zeros(0, COLUMNS.field(name).type.to_pandas_dtype())

    def frame(self, *columns: str) -> pl.DataFrame:
        """These columns, whole: for few rows."""
        frames = list(self.batches(*columns))
        return pl.concat(frames) if frames else pl.DataFrame(schema=list(columns))


@dataclass(frozen=True, slots=True)
class Removed:
    """Removed rows: their number, why, what for (a benchmark question's or a kept row's id), and how near (NaN where it has no
    measure). One array each, by ascending number."""

    numbers: np.ndarray
    reasons: np.ndarray
    partners: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, numbers: Iterable[int], reasons: Any, partners: Any = "", scores: Any = np.nan) -> Removed:
        """From arrays or lists of one length, or single values for all."""
        numbers = np.asarray(list(numbers) if not isinstance(numbers, np.ndarray) else numbers, np.int64)
        order = np.argsort(numbers, kind="stable")
        shape = numbers.shape
        return cls(
            numbers[order],
            np.broadcast_to(np.asarray(reasons, object), shape)[order],
            np.broadcast_to(np.asarray(partners, object), shape)[order],
            np.broadcast_to(np.asarray(scores, np.float64), shape)[order],
        )

    def table(self) -> pa.Table:
        return pa.table(
            {
                "number": pa.array(self.numbers),
                "reason": pa.array(self.reasons.tolist(), pa.large_string()),
                "partner": pa.array(self.partners.tolist(), pa.large_string()),
                "score": pa.array(self.scores),
            }
        )

    @classmethod
    def read(cls, path: Path) -> Removed:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        texts = [np.asarray(table[name].to_pylist(), object).reshape(-1) for name in ("reason", "partner")]
        return cls(table["number"].to_numpy(), *texts, table["score"].to_numpy())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gives: the rows that stay, those removed, and notes for the report. for_judge: numbers of rows that stay but
    that no rule can verify."""

    kept: Rows
    removed: Removed
    notes: dict[str, Any] = field(default_factory=dict)
    for_judge: tuple[int, ...] = ()

    @classmethod
    def without(cls, rows: Rows, removed: Removed, notes: dict[str, Any] | None = None, for_judge: Iterable[int] = ()) -> Outcome:
        mask = ~np.isin(rows.numbers, removed.numbers, assume_unique=True)
        return cls(rows.keep(mask), removed, notes or {}, tuple(for_judge))


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """function over items, results in order, at most 2 · threads items ahead of the reader. For functions that leave the GIL."""
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: list[Any] = []
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * threads:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


class Work:
    """The work folder: a lock, and one folder for each finished step. A step's folder is written beside, flushed to the disk and
    renamed, so that it is whole or not there."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the folder cannot be made, is another's, or another run works in it."""
        self.path = path
        try:
            if path.exists() and not (path / "lock").exists() and any(path.iterdir()):
                raise InputError(f"--work: {path} holds other files; name a new folder, or one of an earlier curation")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / "lock", "a", encoding="utf-8")  # noqa: SIM115 - held open is what holds the lock
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"--work: {path} is in use by another curation; wait for its end, or name another folder") from None
        except OSError as error:
            raise InputError(f"--work: {path} cannot be used ({error.strerror}); name another folder") from None

    def finished(self, step: str, fingerprint: str) -> dict[str, Any] | None:
        """What the step's `step.json` says, if the step was finished under this fingerprint."""
        try:
            state = json.loads((self.path / step / "step.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if state.get("fingerprint") == fingerprint else None

    @contextlib.contextmanager
    def writing(self, step: str) -> Iterator[Path]:
        """A folder to write a step's files into; it becomes the step's when the block ends without an exception."""
        part = self.path / f"{step}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for file in part.iterdir():
            flush(file)
        flush(part)
        shutil.rmtree(self.path / step, ignore_errors=True)
        part.rename(self.path / step)
        flush(self.path)

    def is_empty(self) -> bool:
        """Has no step been finished in it?"""
        return not any(self.path.glob("*/step.json"))

    def close(self) -> None:
        self._lock.close()

    def discard(self) -> None:
        """Take the folder away, with its lock: what is in it is not needed again."""
        shutil.rmtree(self.path, ignore_errors=True)


def flush(path: Path) -> None:
    """Put a file or a folder's list of names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file that becomes `path` at once, when the block ends without an exception; else nothing is left.

    Raises InputError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            flush(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        flush(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); name another place, or make room") from None
