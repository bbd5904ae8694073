"""From metrics rows to what the figures draw: pure functions, no drawing.

Every series has one value a finished step, in order of steps; a value that a row lacks is NaN, which the drawing leaves out.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rollout.errors import InputError
from trainer.config_guards import ALARMS
from trainer.metrics import LEDGER_FATES, PHASES, number

PHASE_NAMES = {
    "sample": "sampling",
    "reward": "rewarding",
    "score": "scoring",
    "update": "update",
    "sync": "weight sync",
    "checkpoint": "checkpoint",
    "evaluate": "evaluation",
    "other": "other",
}


@dataclass(frozen=True, slots=True)
class Band:
    """A run of steps of one stage: `first` to `last`, as places in the series; context in tokens, NaN where unknown."""

    stage: int
    name: str
    first: int
    last: int
    context: float


@dataclass(frozen=True, slots=True)
class EvaluationSeries:
    """pass@1 of one set. steps: finished steps; drawn: raw prompts drawn by then, NaN where no row says."""

    name: str
    steps: np.ndarray
    drawn: np.ndarray
    pass_at_1: np.ndarray


@dataclass(frozen=True, slots=True)
class RunData:
    """A run, ready to draw. All arrays are float64 [n] for n finished steps but those in `evaluations`.

    accuracy: share of right among all samples drawn in the step; drawn: raw prompts so far; seconds: by phase, "other" being what
    time/step holds beyond the phases; ledger: cumulative prompts by fate; alarms: by name, 1 where one lasted. Phases, fates and
    alarms that no row has are absent.
    """

    steps: np.ndarray
    bands: tuple[Band, ...]
    entropy: np.ndarray
    target: np.ndarray
    length: np.ndarray
    context: np.ndarray
    accuracy: np.ndarray
    drawn: np.ndarray
    seconds: dict[str, np.ndarray]
    ledger: dict[str, np.ndarray]
    alarms: dict[str, np.ndarray]
    evaluations: tuple[EvaluationSeries, ...]


def prepare(rows: list[dict]) -> RunData:
    """Raises InputError where no step has finished: there is nothing to draw."""
    train = sorted((row for row in rows if row["kind"] == "train"), key=lambda row: row["step"])
    if not train:
        raise InputError("the run has no finished step, so there is nothing to draw; wait for its first train row")
    evals = sorted((row for row in rows if row["kind"] == "eval"), key=lambda row: row["step"])
    steps, drawn = column(train, "step"), column(train, "ledger/drawn")
    return RunData(
        steps=steps,
        bands=stage_bands(train),
        entropy=column(train, "entropy/mean"),
        target=column(train, "entropy/target"),
        length=column(train, "length/mean"),
        context=column(train, "context"),
        accuracy=column(train, "reward/accuracy"),
        drawn=drawn,
        seconds=phase_seconds(train, evals),
        ledger={fate: column(train, f"ledger/{fate}") for fate in LEDGER_FATES if np.nansum(column(train, f"ledger/{fate}")) > 0},
        alarms={name: column(train, f"alarm/{name}") for name in ALARMS if np.nansum(column(train, f"alarm/{name}")) > 0},
        evaluations=evaluation_series(evals, steps, drawn),
    )


def column(rows: list[dict], key: str) -> np.ndarray:
    """float64 [n] of the numbers under `key`, NaN where absent or null."""
    values = (number(row, key) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def stage_bands(train: list[dict]) -> tuple[Band, ...]:
    """Neighbouring rows of the same stage as one band each; a row without a stage counts as stage 0 without a name."""
    bands, first = [], 0
    for (stage, name), group in groupby(train, key=lambda row: (int(number(row, "stage") or 0), str(row.get("stage_name", "")))):
        members = list(group)
        contexts = column(members, "context")
        context = float(np.nanmax(contexts)) if np.isfinite(contexts).any() else float("nan")
        bands.append(Band(stage, name, first, first + len(members) - 1, context))
        first += len(members)
    return tuple(bands)


def stage_names(band: Band) -> tuple[str, ...]:
    """A band's name with its context and without, longest first; the context is left out where the name says it already
    ("dapo-8k") or where it is unknown. Nothing for a stage without a name."""
    if not band.name:
        return ()
    context = f"{band.context / 1024:.3g}K" if band.context >= 1024 else f"{band.context:.0f} tokens"
    if not np.isfinite(band.context) or context.lower() in band.name.lower():
        return (band.name,)
    return (f"{band.name}, {context}", band.name)


def phase_seconds(train: list[dict], evals: list[dict]) -> dict[str, np.ndarray]:
    """Seconds [n] by phase, NaN as 0. An evaluation's time counts at the step it followed, from its own rows if the step's
    lacks it."""
    seconds = {phase: np.nan_to_num(column(train, f"time/{phase}")) for phase in PHASES}
    if not seconds["evaluate"].any():
        by_step: dict[int, float] = {}
        for row in evals:
            by_step[row["step"]] = by_step.get(row["step"], 0.0) + (number(row, "time/evaluate") or 0.0)
        seconds["evaluate"] = np.array([by_step.get(row["step"], 0.0) for row in train])
    whole = np.nan_to_num(column(train, "time/step"))
    seconds["other"] = np.maximum(0.0, whole - sum(seconds.values()))
    return {phase: values for phase, values in seconds.items() if values.any()}


def evaluation_series(evals: list[dict], steps: np.ndarray, drawn: np.ndarray) -> tuple[EvaluationSeries, ...]:
    """One series a set, in order of names. Prompts drawn at an evaluation are those of the last step finished by then, 0
    before it."""
    series = []
    for name in sorted({str(row.get("name", "")) for row in evals}):
        own = [row for row in evals if str(row.get("name", "")) == name and number(row, "pass@1") is not None]
        if not own:
            continue
        at = column(own, "step")
        drawn_then = np.concatenate([[0.0], drawn])[np.searchsorted(steps, at, side="right")]
        series.append(EvaluationSeries(name, at, drawn_then, column(own, "pass@1")))
    return tuple(series)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of `window` steps (odd), which leaves NaN out and narrows at both ends, so that it neither lags nor
    invents; NaN where the step itself has no value. Example: smooth([1, 2, 6], 3) → [1.5, 3, 4]."""
    half = window // 2
    means = np.full(len(values), np.nan)
    for place in range(len(values)):
        near = values[max(0, place - half) : place + half + 1]
        if np.isfinite(values[place]):
            means[place] = near[np.isfinite(near)].mean()
    return means


def smoothing_window(steps: int) -> int:
    """How many steps a smoothed line averages: a twelfth of the run, odd, at most 25; 1 (none) for a run under 24 steps."""
    return min(25, steps // 12 // 2 * 2 + 1)


def block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of neighbouring blocks of `size` values; the last block may be shorter. Example: [1, 3, 5], 2 → [2, 5]."""
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def block_edges(edges: np.ndarray, size: int) -> np.ndarray:
    """The edges [n + 1] of n values → the edges of the blocks of `block_means`."""
    return np.append(edges[:-1:size], edges[-1])


def shares(series: dict[str, np.ndarray]) -> dict[str, float]:
    """Each one's part in the sum of all, 0 to 1. The sum is above 0."""
    totals = {name: float(values.sum()) for name, values in series.items()}
    whole = sum(totals.values())
    return {name: total / whole for name, total in totals.items()}
