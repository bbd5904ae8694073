"""The form of an experiment: which runs, what is read off them, how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.recipe.plan import Run, Size
from benchmarks.recipe.records import Record


@dataclass(frozen=True, slots=True)
class Findings:
    """said: plain sentences. table: a heading, then rows. numbers: what the sentences rest on, by name."""

    said: list[str]
    table: list[list[str]]
    numbers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Experiment:
    """question: what it asks, in one line. find and draw see records alone, in the order of the runs."""

    name: str
    question: str
    runs: Callable[[Size], list[Run]]
    find: Callable[[Sequence[Record]], Findings]
    draw: Callable[[Figure, Sequence[Record]], None]
    figure: tuple[float, float] = (11.0, 6.4)
    """Inches."""
    shown: str = "shaded or whiskers: 95 % of Student's t over seeds"
    """What the figure's subtitle says of its spread."""
