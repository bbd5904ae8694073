"""What does length normalisation do to lengths? A sum over tokens (the recipe) against GRPO's mean over each response's tokens.

The teacher's lines open with one to six words that mean nothing, so that length is free: no answer is better for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import curves, evaluations, finish
from benchmarks.recipe.plan import DYNAMIC, PSHW, RSR, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, last_third, where
from benchmarks.recipe.task import Wording

FREE = Wording(extra=0.5)
CONTEXT = 112
SEEDS = 3
ARMS = {"sum over tokens": PSHW, "mean over each response": PSHW | {"loss_aggregation": "response_mean"}}


def runs(size: Size) -> list[Run]:
    return [
        Run(
            {"arm": arm, "seed": seed}, Start(seed, size.warmup, FREE), size,
            ({"batch": DYNAMIC, "recovery": RSR, "objective": objective},), CONTEXT,
        )
        for arm, objective in ARMS.items()
        for seed in range(1, min(size.seeds, SEEDS) + 1)
    ]  # fmt: skip


def growth(record: Record, column: str) -> float:
    """Tokens, from the first third of the steps to the last."""
    values = record["train"][column]
    return last_third(values) - last_third(values[::-1])


def find(records: Sequence[Record]) -> Findings:
    table = [["loss", "right: growth, tokens", "wrong: growth, tokens", "wrong - right, last third", "pass@1"]]
    numbers, said = {}, []
    for arm in labels_of(records, "arm"):
        own = where(records, arm=arm)
        right, wrong = (Mean.of(growth(record, column) for record in own) for column in ("right", "wrong"))
        gap = Mean.of(last_third(record["train"]["wrong"]) - last_third(record["train"]["right"]) for record in own)
        table.append([arm, right.text("+.2f"), wrong.text("+.2f"), gap.text("+.2f"), Mean.of(map(final, own)).text(".1%")])
        numbers[arm] = {"right": right.mean, "wrong": wrong.mean, "gap": gap.mean}
        said.append(
            f"With a {arm}, right answers grew by {right.text('+.2f')} tokens and wrong ones by {wrong.text('+.2f')} from the "
            "first third to the last."
        )
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 3)
    arms = {arm: where(records, arm=arm) for arm in labels_of(records, "arm")}
    for axes, column in zip(panels[:2], ("right", "wrong"), strict=True):
        finish(axes, f"Length of {column} answers", "step", "mean tokens")
        curves(axes, arms, column, width=5)
    low = min(axes.get_ylim()[0] for axes in panels[:2])
    high = max(axes.get_ylim()[1] for axes in panels[:2])
    for axes in panels[:2]:
        axes.set_ylim(low, high)
    panels[0].legend(loc="best")
    finish(panels[2], "Held-out pass@1", "step", "share right")
    evaluations(panels[2], arms)


EXPERIMENT = Experiment("length", "What does length normalisation do to the lengths of answers?", runs, find, draw, (13.0, 4.4))
