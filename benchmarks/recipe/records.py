"""What is kept of a run, and the numbers that are read off it. A record is JSON: a figure is drawn from it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.recipe.plan import Run
from benchmarks.recipe.task import BUCKETS
from benchmarks.recipe.work import done
from trainer.metrics import number, read_metrics

COLUMNS = {
    "entropy": "entropy/mean",
    "accuracy": "reward/accuracy",
    "mixed": "language/mixed",
    "right": "length/right",
    "wrong": "length/wrong",
    "length": "length/mean",
    "drawn": "ledger/drawn",
    "expired": "ledger/expired",
    "over_generation": "sampling/over_generation",
    "buffer": "recovery/size",
    "truncated": "verdict/truncated",
}
"""A record's train columns and where they stand in a metrics row; "tokens", sampled so far, comes on top."""

Record = dict[str, Any]


def record_of(run: Run, work: Path) -> Record:
    """labels, key, seconds, commit, start: key and seconds of its warm-up, train: column → value of each step, eval: step and
    each bucket's pass@1 with "all", their mean."""
    folder = work / "runs" / run.key
    rows = read_metrics(folder)
    train = [row for row in rows if row["kind"] == "train"]
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "eval":
            points.setdefault(row["step"], {})[row["name"]] = number(row, "pass@1")
    columns = {name: [number(row, key) or 0.0 for row in train] for name, key in COLUMNS.items()}
    drawn = np.diff([0.0, *columns["drawn"]])
    columns["tokens"] = np.cumsum(drawn * run.size.group_size * np.array(columns["length"])).tolist()
    steps = sorted(points)
    buckets = {name: [points[step][name] for step in steps] for name in BUCKETS}
    whole = [fmean(points[step].values()) for step in steps]
    return {
        "labels": run.labels, "key": run.key, **done(folder),
        "start": {"key": run.start.key, "seconds": done(work / "starts" / run.start.key)["seconds"]},
        "train": {name: rounded(values) for name, values in columns.items()},
        "eval": {"step": steps, **{name: rounded(values) for name, values in buckets.items()}, "all": rounded(whole)},
    }  # fmt: skip


def rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


# of one record


def last_third(values: Sequence[float]) -> float:
    """Mean over the last third of the steps, rounded up."""
    return fmean(values[-max(1, math.ceil(len(values) / 3)) :])


def final(record: Record, bucket: str = "all") -> float:
    return record["eval"][bucket][-1]


def smoothed(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Centred means of `width` values, of fewer at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def reached(record: Record, level: float, by: str) -> float:
    """How much of column `by` ("drawn", "tokens") was used when the smoothed training accuracy first reached `level`, linear
    between steps; infinite where it never did."""
    accuracy, used = smoothed(record["train"]["accuracy"]), record["train"][by]
    for at, value in enumerate(accuracy):
        if value >= level:
            if at == 0:
                return float(used[0])
            share = (level - accuracy[at - 1]) / (value - accuracy[at - 1])
            return float(used[at - 1] + share * (used[at] - used[at - 1]))
    return math.inf


def peak(record: Record) -> float:
    """The highest smoothed training accuracy."""
    return float(smoothed(record["train"]["accuracy"]).max())


# of several


@dataclass(frozen=True, slots=True)
class Mean:
    """Of n values, with half the width of Student's 95 % interval; infinite for one value alone."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        array = np.array(list(values), dtype=np.float64)
        if len(array) < 2:
            return cls(float(array.mean()), math.inf, len(array))
        half = student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
        return cls(float(array.mean()), float(half), len(array))

    @property
    def sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half

    def text(self, form: str = ".3f") -> str:
        return f"{self.mean:{form}}" + (f" ± {self.half:{form.lstrip('+')}}" if math.isfinite(self.half) else "")

    def change(self, unit: str = "points") -> str:
        """Of a share, in hundredths: "+1.4 ± 4.4 points (not certain)"."""
        if not math.isfinite(self.half):
            return f"{100 * self.mean:+.1f} {unit}"
        return f"{100 * self.mean:+.1f} ± {100 * self.half:.1f} {unit}" + ("" if self.sure else " (not certain)")


def where(records: Sequence[Record], **labels: Any) -> list[Record]:
    return [record for record in records if all(record["labels"].get(name) == value for name, value in labels.items())]


def labels_of(records: Sequence[Record], name: str) -> list[Any]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(record["labels"][name] for record in records))


def by_seed(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The records of equal seed, in the order of `second`."""
    known = {record["labels"]["seed"]: record for record in first}
    return [(known[record["labels"]["seed"]], record) for record in second]


def paired(first: Sequence[Record], second: Sequence[Record], of: Callable[[Record], float]) -> Mean:
    """Of second minus first, seed by seed."""
    return Mean.of(of(after) - of(before) for before, after in by_seed(first, second))


def savings(arm: Sequence[Record], against: Sequence[Record], by: str) -> list[float]:
    """Share of column `by` that `arm` did not need, seed by seed, to reach the highest training accuracy that both reached."""
    found = []
    for other, record in by_seed(against, arm):
        level = min(peak(record), peak(other))
        found.append(1 - reached(record, level, by) / reached(other, level, by))
    return found


def band(records: Sequence[Record], column: str, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """(mean, half of the 95 % interval) over the runs, step by step."""
    table = np.array([record[part][column] for record in records])
    means = [Mean.of(column) for column in table.T]
    half = [mean.half if math.isfinite(mean.half) else 0.0 for mean in means]
    return np.array([mean.mean for mean in means]), np.array(half)
