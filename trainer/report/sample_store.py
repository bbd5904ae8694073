"""Packs samples for the page: columns that it filters and sorts by, and the texts in packed pieces that it opens when asked.

A piece is gzip in base64 of a JSON list of groups, {question, answer, samples: [{text, detail, loop, foreign}, …]}. Beside it
stands, where any is kept, a piece of the same groups' tokens: [[{ends, logprob, entropy} or null, …] or null, …], the ends as
differences, the others in thousandths of a nat. All places are in UTF-16 units.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.report.marks import browser_places, find_foreign, find_loop
from trainer.report.sample_files import Reading, RecordedGroup, RecordedSample, Survey, parse_group, read_lines, taken

PIECE_CHARACTERS = 400_000
"""A piece is opened in milliseconds, and is large enough to be packed well."""
TEXT_LEVEL, TOKEN_LEVEL = 5, 2
"""Of gzip: numbers gain little from more work."""
PREVIEW = 100
ENDING = 60
"""Characters of a question, and of an output's end, that the list shows."""
WRONG, RIGHT, UNJUDGED = 0, 1, 2
GROUP_COLUMNS = ("run", "step", "stage", "prompt", "fate", "drawn", "piece", "place", "detail")
ROW_COLUMNS = ("group", "verdict", "reason", "finish", "mixed", "version", "tokens", "advantage", "logprob", "entropy", "ending")
NAMED = ("stages", "prompts", "fates", "reasons", "finishes")
_SPECIAL = re.compile(r"</?(?:think|answer)>|<[|｜][^<>|｜]*[|｜]>")
_BLANKS = re.compile(r"\s+")


class SampleStore:
    """Groups go in run by run, then `index` tells of what is in. notes: for a person, what was left out and why. pieces: (texts,
    tokens) of each, packed, tokens "" where none are kept; whole after `index`."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.pieces: list[tuple[str, str]] = []
        self._groups: dict[str, list] = {key: [] for key in GROUP_COLUMNS}
        self._rows: dict[str, list] = {key: [] for key in ROW_COLUMNS}
        self._names: dict[str, dict[Any, int]] = {key: {} for key in NAMED}
        self._texts: list[dict] = []
        self._tokens: list[list | None] = []
        self._characters = self._found = 0

    def add_run(
        self, run: int, folder: Path, found: Survey, reading: Reading, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """run: the run's place in the page."""
        self._found += found.groups
        self.notes.extend(found.notes)
        place = 0
        for number, path in enumerate(found.files):
            if number % 20 == 0:
                progress(f"{folder}: sample file {number + 1} of {len(found.files)}, {len(self._rows['group']):,} samples packed")
            bad = 0
            for line in read_lines(path):
                if taken(place, reading.groups):
                    group = parse_group(line)
                    bad += group is None
                    if group is not None:
                        self._add(run, group, detail=taken(len(self._groups["run"]), reading.detail))
                place += 1
            if bad:
                self.notes.append(f"{path}: {bad} lines are no groups with a step and samples; left out")

    def index(self) -> dict[str, Any]:
        """As JSON can hold it."""
        self._close_piece()
        names = {key: list(places) for key, places in self._names.items()}
        return {
            "found_groups": self._found,
            "notes": self.notes,
            "pieces": len(self.pieces),
            "groups": self._groups,
            "rows": self._rows,
            **names,
        }

    def _add(self, run: int, group: RecordedGroup, *, detail: bool) -> None:
        texts = [_text_of(sample, group.question) for sample in group.samples]
        tokens = [_tokens_of(sample) for sample in group.samples] if detail else None
        detail = tokens is not None and any(tokens)
        values = (
            run,
            group.step,
            self._place("stages", group.stage_name or f"stage {group.stage + 1}"),
            self._place("prompts", (group.prompt, _short(group.question, PREVIEW), group.source)),
            self._place("fates", group.fate or "not recorded"),
            group.drawn_step,
            len(self.pieces),
            len(self._texts),
            int(detail),
        )
        for key, value in zip(GROUP_COLUMNS, values, strict=True):
            self._groups[key].append(value)
        for sample in group.samples:
            self._add_row(sample)
        self._texts.append({"question": group.question, "answer": group.answer, "samples": texts})
        self._tokens.append(tokens if detail else None)
        self._characters += sum(len(sample.text) for sample in group.samples)
        if self._characters >= PIECE_CHARACTERS:
            self._close_piece()

    def _add_row(self, sample: RecordedSample) -> None:
        judged = sample.right is not None and sample.reason != "unjudged"
        verdict = UNJUDGED if not judged else RIGHT if sample.right else WRONG
        values = (
            len(self._groups["run"]) - 1,
            verdict,
            self._place("reasons", sample.reason or "not recorded"),
            self._place("finishes", sample.finish or "not recorded"),
            int(sample.mixed),
            sample.version,
            sample.tokens,
            None if sample.advantage is None else round(sample.advantage, 4),
            _mean(sample.logprob),
            _mean(sample.entropy),
            _ending(sample.text),
        )
        for key, value in zip(ROW_COLUMNS, values, strict=True):
            self._rows[key].append(value)

    def _place(self, kind: str, name: Any) -> int:
        places = self._names[kind]
        return places.setdefault(name, len(places))

    def _close_piece(self) -> None:
        if self._texts:
            tokens = pack(self._tokens, TOKEN_LEVEL) if any(self._tokens) else ""
            self.pieces.append((pack(self._texts, TEXT_LEVEL), tokens))
        self._texts, self._tokens, self._characters = [], [], 0


def pack(value: Any, level: int) -> str:
    """JSON in gzip in base64, the same for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packer = zlib.compressobj(level, wbits=31)
    packed = packer.compress(text.encode("utf-8", "replace")) + packer.flush()
    return base64.b64encode(packed).decode("ascii")


def _text_of(sample: RecordedSample, question: str) -> dict[str, Any]:
    found = {"text": sample.text, "detail": sample.detail}
    if loop := find_loop(sample.text, sample.reason):
        found["loop"] = [*browser_places(sample.text, loop[:2]), *loop[2:]]
    if sample.mixed and (foreign := find_foreign(sample.text, question)):
        found["foreign"] = browser_places(sample.text, foreign)
    return found


def _tokens_of(sample: RecordedSample) -> dict[str, Any] | None:
    """None where the sample keeps none, or ends that are no places of its text in order."""
    ends = None if sample.ends is None else _array(sample.ends)
    if ends is None or not np.isfinite(ends).all():
        return None
    steps = np.diff(ends, prepend=0.0)
    if (steps < 0).any() or ends[-1] > len(sample.text):
        return None
    places = browser_places(sample.text, ends.astype(np.int64).tolist())
    return {
        "ends": np.diff(places, prepend=0).tolist(),
        "logprob": _thousandths(sample.logprob),
        "entropy": _thousandths(sample.entropy),
    }


def _thousandths(values: list | None) -> list[int | None] | None:
    array = None if values is None else _array(values)
    if array is None:
        return None
    finite = np.isfinite(array)
    whole = np.rint(1000 * np.where(finite, array, 0.0)).astype(np.int64).tolist()
    return whole if finite.all() else [value if good else None for value, good in zip(whole, finite.tolist(), strict=True)]


def _mean(values: list | None) -> float | None:
    """None also where an item is null or no number."""
    if values is None:
        return None
    try:
        mean = sum(values) / len(values)
    except TypeError:
        return None
    return round(mean, 3) if math.isfinite(mean) else None


def _array(values: list) -> np.ndarray | None:
    """float64 [n], null as NaN; None where an item is no number."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 else None


def _short(text: str, limit: int) -> str:
    text = _BLANKS.sub(" ", text[: 4 * limit]).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _ending(text: str) -> str:
    """The end of what a reader is told: of the text without its tags and special tokens."""
    text = _BLANKS.sub(" ", _SPECIAL.sub(" ", text[-8 * ENDING :])).strip()
    return text if len(text) <= ENDING else "…" + text[1 - ENDING :]
