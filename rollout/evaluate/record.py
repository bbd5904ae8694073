"""An evaluation's folder: what was asked for, and every output as it came, so that a killed evaluation goes on where it was.

    DIR/evaluation.json    all that decides the outcome; another start must ask for the same
    DIR/outputs.jsonl      one line an output, in the order they were judged; appended, and on disk before the next are waited for
    DIR/sessions.jsonl     one line for each start that sampled anything: with which machine, versions and commit
    DIR/results.json       computed from the three above alone, as results.md is

A line that a kill tore is the last one; the next start cuts it off and samples that output again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rollout.errors import InputError
from rollout.types import Prompt, Sample

if TYPE_CHECKING:
    from rollout.evaluate.grading import Grade

SETTINGS, OUTPUTS, RESULTS, TABLE = "evaluation.json", "outputs.jsonl", "results.json", "results.md"
SESSIONS = "sessions.jsonl"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the estimators need of an output. question, sample: from 0. right: None where unjudged. session: which start of the
    command sampled it, from 0; at: seconds into that session's work on the benchmark."""

    question: int
    sample: int
    right: bool | None
    rewarded: bool
    reason: str
    repetitive: bool
    mixed: bool
    tokens: int
    session: int
    at: float


_FIELDS = Outcome.__slots__


class Record:
    """Of one folder, by the process that has its lock; provenance: that process's. Nothing is written before the first output.
    Raises InputError for a folder that was begun with other settings, and for one whose outputs.jsonl is damaged."""

    def __init__(self, folder: Path, settings: dict[str, Any], provenance: dict[str, str]) -> None:
        self._folder, self._settings, self._provenance = folder, settings, provenance
        self._outcomes: dict[str, dict[tuple[int, int], Outcome]] = {}
        _check_settings(folder, settings)
        path = folder / OUTPUTS
        self._sound = 0
        if path.exists():
            for end, row in _rows(path):
                self._sound = end
                self._take(row["benchmark"], Outcome(**{name: row[name] for name in _FIELDS}))
        self.session = 1 + max((outcome.session for each in self._outcomes.values() for outcome in each.values()), default=-1)
        self._file: BinaryIO | None = None

    def outcomes(self, benchmark: str) -> dict[tuple[int, int], Outcome]:
        """(question, sample) → outcome, of what has been kept so far."""
        return self._outcomes.get(benchmark, {})

    def provenance(self) -> list[dict[str, str]]:
        """Of every session that sampled something, those that are alike once."""
        path = self._folder / SESSIONS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows: list[dict[str, str]] = []
        for line in lines:
            if line.endswith(b"\n") and (row := json.loads(line)) not in rows:
                rows.append(row)
        return rows

    def append(self, benchmark: str, judged: Sequence[tuple[int, int, Prompt, Sample, Grade]], at: float) -> None:
        """(question, sample, …) each. On disk when it returns. An output that is there already (a batch is sampled whole again)
        is left as it was."""
        lines = []
        for question, number, prompt, sample, grade in judged:
            if (question, number) in self.outcomes(benchmark):
                continue
            outcome = Outcome(
                question, number, grade.right if grade.judged else None, grade.rewarded, grade.reason, grade.repetitive,
                grade.mixed, len(sample.token_ids), self.session, round(at, 3),
            )  # fmt: skip
            row = {"benchmark": benchmark, "id": prompt.id} | {name: getattr(outcome, name) for name in _FIELDS}
            row |= {"finish": sample.finish_reason, "detail": grade.detail, "gold": prompt.answer, "answer": grade.answer}
            lines.append(json.dumps(row | {"text": grade.text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._take(benchmark, outcome)
        if lines:
            file = self._opened()
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            if not (self._folder / SETTINGS).exists():
                write_text(self._folder / SETTINGS, json.dumps(self._settings, indent=1, ensure_ascii=False) + "\n")
            with (self._folder / SESSIONS).open("a+b") as sessions:
                sessions.seek(0)
                sessions.truncate(sessions.read().rfind(b"\n") + 1)
                sessions.write(json.dumps(self._provenance, ensure_ascii=False).encode() + b"\n")
                sessions.flush()
                os.fsync(sessions.fileno())
            self._file = (self._folder / OUTPUTS).open("ab")
            self._file.truncate(self._sound)
        return self._file

    def _take(self, benchmark: str, outcome: Outcome) -> None:
        self._outcomes.setdefault(benchmark, {})[outcome.question, outcome.sample] = outcome


def write_text(path: Path, text: str) -> None:
    """Beside, flushed to disk and renamed: a reader sees the old file or the new."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.exists():
        if (folder / OUTPUTS).exists():
            raise InputError(f"{folder}: holds {OUTPUTS} and no {SETTINGS}, so nobody knows what was asked; name another --out")
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read as JSON; name another --out") from None
    for name, before, now in _differences(begun, json.loads(json.dumps(settings))):
        raise InputError(f"{folder}: was begun with {name} {_short(before)}, now it is {_short(now)}; name another --out")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name or "settings", before, now


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where the line ends, row); a last line without an end is left out."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
                complete = "benchmark" in row and all(name in row for name in _FIELDS)
            except (ValueError, TypeError):
                complete = False
            if not complete:
                raise InputError(f"{path}: line {number} is no output of an evaluation: {line[:60]!r}; remove or mend that line")
            yield end, row


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
