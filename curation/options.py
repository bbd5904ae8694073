"""Everything that decides what a curation keeps. Checked once, where it is made."""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from curation.errors import InputError

STEPS = ("decontaminate", "ground_truth", "exact", "fuzzy", "semantic", "question_type", "verifiable")
"""The steps, in the paper's order."""


@dataclass(frozen=True, slots=True)
class Source:
    """One raw file. name: a field map's name or a label of the user's, "" to find both from the file."""

    path: Path
    name: str = ""
    exempt: bool = False
    """Proprietary: cleaned of entry noise, checked against the benchmarks, kept otherwise; what equals it elsewhere goes."""

    @classmethod
    def parse(cls, text: str, exempt: bool = False) -> Source:
        """`PATH` or `NAME=PATH`. A path that holds a "=" and exists is a path."""
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            return cls(Path(text), exempt=exempt)
        if not name or not path:
            raise InputError(f"{text!r}: is neither PATH nor NAME=PATH; write, say, gsm8k=raw/train.jsonl")
        return cls(Path(path), name, exempt)


@dataclass(frozen=True, slots=True)
class Options:
    """What to keep. Raises InputError for a value out of its range, naming option, value and range."""

    fields: dict[str, str] = field(default_factory=dict)
    """`--map`: question, answer, solution, options, id → a column, or a path such as `prompt.0.content`."""
    skip: tuple[str, ...] = ()
    ngram: int = 10
    """Tokens of an n-gram in the decontamination. A token is a word, a number, a LaTeX command, a Chinese character or a sign."""
    overlap: float = 0.7
    """Share of a benchmark question's n-grams, at which a row that has them counts as that question."""
    shingle: int = 3
    """Tokens of a shingle, of whose sets the Jaccard similarity is taken."""
    fuzzy_threshold: float = 0.8
    bands: int = 25
    band_rows: int = 5
    semantic_threshold: float = 0.95
    texts_alone: bool = False
    """Call near texts one question whatever their answers and numbers are, as the paper does (`curation.steps.pairs`)."""
    dimensions: int = 64
    """Dimensions of the embedded default's vectors; a model has its own."""
    embedder: str = ""
    """Folder of a model2vec or sentence-transformers model; "" is the embedded default, which needs none."""
    verify_seconds: float = 10.0
    """Hard limit for one answer; a worker beyond it is killed."""
    solutions: bool = False
    """Carry the reference solutions into the output."""
    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Speed only; the result does not depend on it."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ngram", 2, 50), ("overlap", 0.05, 1.0), ("shingle", 1, 10), ("fuzzy_threshold", 0.3, 1.0), ("bands", 1, 64),
            ("band_rows", 1, 16), ("semantic_threshold", 0.3, 1.0), ("dimensions", 2, 1024), ("verify_seconds", 0.1, 3600.0),
            ("seed", 0, 2**31 - 1), ("threads", 1, 1024),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"--{name.replace('_', '-')}: {value} is out of range; give it {low} to {high}")
        for step in self.skip:
            if step not in STEPS:
                close = difflib.get_close_matches(step, STEPS, n=1, cutoff=0.0)[0]
                raise InputError(f"--skip: {step!r} is no step; the nearest is {close!r} (steps: {', '.join(STEPS)})")
        if self.embedder and not Path(self.embedder).is_dir():
            raise InputError(
                f"--embedder: {self.embedder!r} is no folder; name a model2vec or sentence-transformers model's folder"
            )

    def deciding(self, *names: str) -> dict[str, object]:
        """The named values, as plain JSON, for a step's fingerprint and the report. Threads never belong to it."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in names}
