"""Reads RUN/samples (`trainer.samples`) for the page. Older files may lack fields, and a file may be torn.

Two passes. The survey unpacks every file and looks into one group of each, which tells about how much there is; so it is known
beforehand what part of the groups the page has room for, and a file is never held as a whole.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics import number
from trainer.samples import files_of

PACKED_TEXT = 0.45
"""What a byte of text weighs in the page: packed about threefold, then written in base64."""
PACKED_TOKEN = 5.0
"""And the end, log-probability and entropy of a token."""


@dataclass(frozen=True, slots=True)
class RecordedSample:
    """A field that the file lacks is None, or "" for a text. ends, logprob, entropy: of each token, of equal length, or None."""

    text: str
    right: bool | None
    reason: str
    detail: str
    mixed: bool
    finish: str
    version: int | None
    tokens: int | None
    advantage: float | None
    ends: list[int] | None
    logprob: list[float] | None
    entropy: list[float] | None


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    """fate: what became of the group in this step."""

    step: int
    stage: int
    stage_name: str
    prompt: str
    question: str
    answer: str
    source: str
    fate: str
    drawn_step: int | None
    samples: tuple[RecordedSample, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """A run's sample files, and about what is in them: groups exactly, the rest reckoned from one group a file. notes: what
    cannot be read."""

    files: tuple[Path, ...]
    groups: int
    samples: float
    text_bytes: float
    tokens: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The part of the groups that is read, and the part of those that keep the detail of their tokens; both in (0, 1]."""

    groups: float
    detail: float


def survey(run: Path, progress: Callable[[str], None] = lambda _: None) -> Survey:
    """Of a run without samples: no files."""
    files = tuple(files_of(Path(run)))
    groups, samples, text_bytes, tokens = 0, 0.0, 0.0, 0.0
    notes = []
    for place, path in enumerate(files):
        if place % 50 == 0:
            progress(f"{run}: looking over sample file {place + 1} of {len(files)}")
        lines, first = 0, None
        try:
            for line in _lines(path):
                lines += 1
                if first is None:
                    first = parse_group(line)
            if not lines:  # to gzip a file without a byte is whole
                raise EOFError("it is empty")
        except (OSError, EOFError, zlib.error) as error:
            notes.append(f"{path}: torn or unreadable after {lines} groups ({error}); the rest of it is left out")
        groups += lines
        if first is not None:
            samples += lines * len(first.samples)
            text_bytes += lines * sum(len(sample.text.encode("utf-8", "replace")) for sample in first.samples)
            tokens += lines * sum(len(sample.ends) for sample in first.samples if sample.ends is not None)
    return Survey(files, groups, samples, text_bytes, tokens, tuple(notes))


def plan_reading(surveys: list[Survey], samples: int, megabytes: float) -> Reading:
    """Which part of the groups fits into so many samples and three quarters of the bytes; the detail of tokens has the rest."""
    room = megabytes * 1e6
    count = max(1.0, sum(each.samples for each in surveys))
    text = max(1.0, sum(each.text_bytes for each in surveys) * PACKED_TEXT)
    groups = min(1.0, samples / count, 0.75 * room / text)
    detail = max(1.0, groups * sum(each.tokens for each in surveys) * PACKED_TOKEN)
    return Reading(groups, min(1.0, (room - groups * text) / detail))


def taken(place: int, part: float) -> bool:
    """Whether the item at `place` is among an even selection of this part of all. Example: part 0.5 → every second."""
    return int((place + 1) * part + 1e-9) > int(place * part + 1e-9)


def read_lines(path: Path) -> Iterator[bytes]:
    """A file's lines, a group each; ends early where the file is torn, which the survey has told."""
    try:
        yield from _lines(path)
    except (OSError, EOFError, zlib.error):
        return


def parse_group(line: bytes) -> RecordedGroup | None:
    """None for what is no group with a step and a sample."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    entries = row.get("samples")
    samples = [_sample(entry) for entry in entries] if isinstance(entries, list) else []
    if not samples or None in samples:
        return None
    prompt = row["prompt"] if isinstance(row.get("prompt"), dict) else {}
    return RecordedGroup(
        step=row["step"],
        stage=_whole(row, "stage") or 0,
        stage_name=_text(row, "stage_name"),
        prompt=_text(prompt, "id"),
        question=_text(prompt, "question"),
        answer=_text(prompt, "answer"),
        source=_text(prompt, "source"),
        fate=_text(row, "fate"),
        drawn_step=_whole(row, "drawn_step"),
        samples=tuple(samples),
    )


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from file


def _sample(entry: Any) -> RecordedSample | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        return None
    ends = _numbers(entry.get("ends"))
    count = None if ends is None else len(ends)
    tokens = _whole(entry, "tokens")
    return RecordedSample(
        text=entry["text"],
        right=entry["right"] if isinstance(entry.get("right"), bool) else None,
        reason=_text(entry, "reason"),
        detail=_text(entry, "detail"),
        mixed=entry.get("mixed") is True,
        finish=_text(entry, "finish"),
        version=_whole(entry, "version"),
        tokens=count if tokens is None else tokens,
        advantage=number(entry, "advantage"),
        ends=ends,
        logprob=_numbers(entry.get("logprob"), count),
        entropy=_numbers(entry.get("entropy"), count),
    )


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def _whole(row: dict, key: str) -> int | None:
    value = number(row, key)
    return None if value is None else int(value)


def _numbers(values: Any, count: int | None = None) -> list | None:
    """The list where it is one, of `count` items (any number where None); what an item is, is looked at when it is packed."""
    return values if isinstance(values, list) and values and count in (None, len(values)) else None
