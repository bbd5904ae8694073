"""What do stages of growing context save? Three in a row, against the largest from the start, for the same number of steps.

The teacher's lines open with one to six words that mean nothing, so that some outputs are longer than a short context has room
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import curves, finish, over
from benchmarks.recipe.length import FREE
from benchmarks.recipe.plan import DYNAMIC, PSHW, RSR, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, savings, where

CONTEXTS = (64, 80, 112)
SEEDS = 3
RECIPE = {"batch": DYNAMIC, "recovery": RSR, "objective": PSHW}
GROWING, LARGEST = "64 → 80 → 112", "112 from the start"
ARMS = {GROWING: tuple(RECIPE | {"context": context} for context in CONTEXTS), LARGEST: (RECIPE | {"context": CONTEXTS[-1]},)}


def runs(size: Size) -> list[Run]:
    size = replace(size, steps=max(size.steps, len(CONTEXTS)))
    return [
        Run({"arm": arm, "seed": seed}, Start(seed, size.warmup, FREE), size, stages)
        for arm, stages in ARMS.items()
        for seed in range(1, min(size.seeds, SEEDS) + 1)
    ]


def find(records: Sequence[Record]) -> Findings:
    table = [["context", "tokens sampled", "mean length, last step", "pass@1"]]
    for arm in labels_of(records, "arm"):
        own = where(records, arm=arm)
        table.append([
            arm, Mean.of(record["train"]["tokens"][-1] for record in own).text(",.0f"),
            Mean.of(record["train"]["length"][-1] for record in own).text(".1f"), Mean.of(map(final, own)).text(".1%"),
        ])  # fmt: skip
    saved = Mean.of(savings(where(records, arm=GROWING), where(records, arm=LARGEST), "tokens"))
    said = [f"To the same training accuracy, growing contexts saved {saved.change(unit='%')} of the tokens sampled."]
    return Findings(said, table, {"saved": saved.mean})


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 3)
    arms = {arm: where(records, arm=arm) for arm in labels_of(records, "arm")}
    finish(panels[0], "Accuracy over tokens sampled", "tokens sampled", "share right in training")
    over(panels[0], arms, "tokens")
    panels[0].legend(loc="best")
    finish(panels[1], "Response length", "step", "mean tokens")
    curves(panels[1], arms, "length")
    finish(panels[2], "Truncated outputs", "step", "share")
    curves(panels[2], arms, "truncated")
    panels[2].set_ylim(bottom=0)


EXPERIMENT = Experiment("stages", "What do stages of growing context save?", runs, find, draw, (13.0, 4.4))
