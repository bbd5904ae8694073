"""How strong must TER be, and does it depend on the learning rate? A heat map each, from a start of too high entropy: how far
entropy is from its target at the end, how soon it got there, what became of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import finish, heat
from benchmarks.recipe.plan import LEARNING_RATE, TER, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, last_third, smoothed, where
from benchmarks.recipe.ter import NEAR, STARTS, TARGET

COEFFICIENTS = (0.06, 0.2, 0.6, 2.0)
RATES = (5e-5, LEARNING_RATE, 4.5e-4)
SEEDS = 2


def runs(size: Size) -> list[Run]:
    coefficients, rates = (COEFFICIENTS[::3], RATES[::2]) if size.quick else (COEFFICIENTS, RATES)
    found = []
    for coefficient in coefficients:
        for rate in rates:
            stage = {"objective": TER | {"entropy_coefficient": coefficient}, "actor": {"lr": rate}}
            for seed in range(1, min(size.seeds, SEEDS) + 1):
                start = Start(seed, size.warmup, STARTS["too high"])
                found.append(Run({"coefficient": coefficient, "rate": rate, "seed": seed}, start, size, (stage,)))
    return found


def distance(record: Record) -> float:
    """Mean distance of a step's entropy to the target over the last third, in nats: swinging about it is a distance too."""
    return last_third([abs(entropy - TARGET) for entropy in record["train"]["entropy"]])


def arrival(record: Record) -> int:
    """The first step whose smoothed entropy is near the target; one more than there are where there is none."""
    near = np.abs(smoothed(record["train"]["entropy"]) - TARGET) <= NEAR
    return int(near.argmax()) + 1 if near.any() else len(near) + 1


def arrivals(own: Sequence[Record]) -> str:
    """Of the seeds of one cell, each."""
    steps = len(own[0]["train"]["entropy"])
    return ", ".join(str(step) if step <= steps else "never" for step in map(arrival, own))


def cells(records: Sequence[Record], of: Callable[[Record], float]) -> np.ndarray:
    """[coefficients, rates], means over seeds."""
    rows, columns = labels_of(records, "coefficient"), labels_of(records, "rate")
    return np.array([[fmean(map(of, where(records, coefficient=row, rate=column))) for column in columns] for row in rows])


def find(records: Sequence[Record]) -> Findings:
    coefficients, rates = labels_of(records, "coefficient"), labels_of(records, "rate")
    steps = len(records[0]["train"]["entropy"])
    table = [["entropy_coefficient", "lr", "distance to the target", "steps to it", "pass@1", "mixed outputs"]]
    for coefficient in coefficients:
        for rate in rates:
            own = where(records, coefficient=coefficient, rate=rate)
            mixed = Mean.of(last_third(record["train"]["mixed"]) for record in own)
            table.append([
                f"{coefficient:g}", f"{rate:g}", f"{fmean(map(distance, own)):.3f}", arrivals(own),
                f"{fmean(map(final, own)):.1%}", f"{mixed.mean:.1%}",
            ])  # fmt: skip
    far, accuracy = cells(records, distance), cells(records, final)
    held = {
        f"{rate:g}": [f"{coefficient:g}" for row, coefficient in enumerate(coefficients) if far[row, column] <= NEAR]
        for column, rate in enumerate(rates)
    }
    said = [
        f"Coefficients, of {', '.join(f'{each:g}' for each in coefficients)}, with which entropy is on average within {NEAR} of "
        f"the target {TARGET} over the last third of {steps} steps: "
        + "; ".join(f"at a learning rate of {rate} {', '.join(each) or 'none'}" for rate, each in held.items()) + ".",
        "pass@1 at the end, mean over coefficients: "
        + ", ".join(f"learning rate {rate:g} {accuracy[:, column].mean():.1%}" for column, rate in enumerate(rates))
        + "; mean over learning rates: "
        + ", ".join(f"coefficient {each:g} {accuracy[row].mean():.1%}" for row, each in enumerate(coefficients)) + ".",
    ]  # fmt: skip
    return Findings(said, table, {"held": held})


def draw(figure: Figure, records: Sequence[Record]) -> None:
    coefficients, rates = labels_of(records, "coefficient"), labels_of(records, "rate")
    steps = [[arrivals(where(records, coefficient=row, rate=column)) for column in rates] for row in coefficients]
    panels = figure.subplots(1, 3)
    for axes, title, of, texts in (
        (panels[0], "Distance of entropy to its target, last third", distance, None),
        (panels[1], f"Steps until it is within {NEAR}, each seed", arrival, steps),
        (panels[2], "pass@1", final, None),
    ):
        finish(axes, title, "actor.lr", "entropy_coefficient")
        heat(axes, [f"{each:g}" for each in coefficients], [f"{each:g}" for each in rates], cells(records, of), texts=texts)


EXPERIMENT = Experiment(
    "coefficient", "How strong must TER be, at which learning rate?", runs, find, draw, (13.0, 4.4), "a cell: mean over seeds"
)
