"""What a run measured: rows in `metrics.jsonl`, and the same scalars in TensorBoard.

A row is a flat dict with "kind" ("train" or "eval") and "step", the number of steps finished: a train row's first step is 1,
and an evaluation before training has step 0. A key that does not apply is absent. Everything under TIMING_PREFIXES is
wall-clock-like and differs between two runs that are otherwise bitwise equal (a judge is not asked again for what it decided
before a stop, a disk is full once); `comparable` leaves it out.

The file is the record and TensorBoard is a view of it: figures, summaries and tests read the file only.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout.errors import InputError

METRICS_FILE = "metrics.jsonl"
TIMING_PREFIXES = ("time/", "rate/", "memory/", "judge/", "checkpoint/")
PHASES = ("sample", "reward", "score", "update", "sync", "checkpoint", "evaluate")
"""The parts of a step; time/<phase> is in seconds."""
LEDGER_FATES = ("trained", "recovered", "uniform", "expired", "aborted", "failed", "pending")
"""What became of the prompts drawn so far; ledger/<fate> are counts that sum to ledger/drawn."""


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl` and scalars to `run_dir/tensorboard`; one process of a run owns it.

    resume_after: the last finished step of the checkpoint that the run continues from; rows of later steps were measured by
    work that is now done again, so they are dropped, and TensorBoard purges them likewise. None starts a new record: what an
    earlier start left in the file is kept beside it as `metrics.jsonl.old`, or `.old.2` and so on.

    note: told once when the disk does not take a row, and once when it does again. Rows wait in memory meanwhile.

    Raises InputError where the file to resume holds a corrupt line other than a torn last one, and OSError.
    """

    def __init__(self, run_dir: Path, *, resume_after: int | None, note: Callable[[str], None] = lambda _: None):
        # Imported here: it brings torch with it, which a reader of metrics does not need.
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept = _reopen(path, resume_after)
        self._evaluated = {(row["step"], row.get("name")): number(row, "pass@1") for row in kept if row["kind"] == "eval"}
        self._path, self._note = path, note
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        """What the disk has not taken yet."""
        self._refused = False
        purge_step = 0 if resume_after is None else resume_after + 1
        self._tensorboard: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, row: dict) -> None:
        """Append one row at once, so that a killed process has lost nothing it wrote. One that the disk refuses is written with
        the next: a full disk is no reason to lose a step.

        A NaN or infinite number is written as null: JSON has neither, a string in a column of numbers would break its
        readers, and a metric that cannot be computed must not end a run. Raises ValueError for a row without a kind and a
        step, and TypeError for a value that is no number, string, boolean or None.
        """
        if row.get("kind") not in ("train", "eval") or not isinstance(row.get("step"), int):
            raise ValueError(f'a metrics row needs "kind" ("train" or "eval") and an int "step", not {row}')
        row = {key: _finite(value) for key, value in row.items()}
        self._waiting += _line(row).encode()
        self._append()
        if row["kind"] == "eval":
            self._evaluated[row["step"], row.get("name")] = number(row, "pass@1")
        self._show(row)

    def _append(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._refused:
                self._note(f"{self._path}: {error.strerror}: rows wait in memory until it takes them; free space there")
            self._refused = True
            return
        if self._refused:
            self._note(f"{self._path}: takes rows again; all that waited are written")
        self._refused = False

    def _show(self, row: dict) -> None:
        """In TensorBoard, whose writer raises what befell its thread, whenever it is next asked."""
        if self._tensorboard is None:
            return
        try:
            for tag, value in _scalars(row):
                self._tensorboard.add_scalar(tag, value, row["step"])
            self._tensorboard.flush()
        except Exception as error:  # a view must not end a run
            self._note(f"TensorBoard's files cannot be written ({error}): no more of them until the next start")
            self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            with contextlib.suppress(Exception):
                tensorboard.close()

    def has_evaluation(self, step: int, name: str) -> bool:
        """Whether an evaluation row of this step and set is recorded: after a kill between a checkpoint and the next step, it
        tells whether the evaluation that was due is still to be done."""
        return (step, name) in self._evaluated

    def score(self, step: int) -> float | None:
        """Mean pass@1 over the sets that were evaluated after `step`; None where there is none, or one was not judged."""
        scores = [score for (at, _), score in list(self._evaluated.items()) if at == step]
        return sum(scores) / len(scores) if scores and None not in scores else None

    def hindrance(self) -> str | None:
        """Tries again to write what waits. What keeps it from that, or None: a checkpoint of steps whose rows are nowhere would
        lose them for good."""
        self._append()
        rows = self._waiting.count(b"\n")
        return f"{self._path}: {rows} rows cannot be written" if rows else None

    def close(self) -> None:
        """Says so where rows are lost."""
        if (hindrance := self.hindrance()) is not None:
            self._note(f"{hindrance}, and are lost; the checkpoints are of steps before them")
        self._file.close()
        self._close_tensorboard()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """All rows of a run in the order written; a last line that a kill tore is left out.

    Raises InputError for a missing file, and for a corrupt line that is not a torn last one.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run that has finished a step")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # the last piece has no newline behind it: its write was cut short
            raise InputError(f"{path}: line {number} is not a metrics row: {line[:60]!r}; remove or mend that line")
    return rows


def train_rows(run_dir: Path) -> list[dict]:
    """A run's train rows in order of steps."""
    return sorted((row for row in read_metrics(run_dir) if row["kind"] == "train"), key=lambda row: row["step"])


def comparable(row: dict) -> dict:
    """The row without what depends on the clock or the machine, so that two runs can be compared for bitwise equality."""
    return {key: value for key, value in row.items() if not key.startswith(TIMING_PREFIXES)}


def number(row: dict, key: str) -> float | None:
    """The finite number under `key`, or None where it is absent, null or no number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it over: a reader, or a start after a kill, sees the old file or the new, never a
    part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def aside(path: Path) -> Path:
    """Where nothing is yet: path, or with .2, .3, …: a second start from nothing must not take the place of weeks."""
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not os.path.lexists(each))


def _reopen(path: Path, resume_after: int | None) -> list[dict]:
    """Leave in the file only the rows that a run continuing after `resume_after` would have written by then; return them."""
    if not path.exists():
        return []
    if resume_after is None and not path.stat().st_size:
        return []
    if resume_after is None:
        os.replace(path, aside(path.with_name(path.name + ".old")))
        return []
    kept = [row for row in read_metrics(path.parent) if row["step"] <= resume_after]
    replace_text(path, "".join(_line(row) for row in kept))
    return kept


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, dict) and row.get("kind") in ("train", "eval") and isinstance(row.get("step"), int):
        return row
    return None


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row: dict) -> list[tuple[str, float]]:
    prefix = f"eval/{row.get('name', 'unnamed')}/" if row["kind"] == "eval" else ""
    return [(prefix + key, number(row, key)) for key in row if key != "step" and number(row, key) is not None]
