"""Does a base model's entropy foretell what RL makes of it? (the paper's third open question)

Base models that differ in how long they were warmed up, and so in their entropy; the same RL for each. What a longer warm-up
teaches and what it does to entropy are one thing here, so this is no test of the paper's claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import COLORS, finish
from benchmarks.recipe.plan import GRPO, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, where

WARMUPS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the usual length."""
SEEDS = 3


def runs(size: Size) -> list[Run]:
    return [
        Run({"arm": share, "seed": seed}, Start(seed, round(share * size.warmup)), size, ({"objective": GRPO},))
        for share in (WARMUPS[-2:] if size.quick else WARMUPS)
        for seed in range(1, min(size.seeds, SEEDS) + 1)
    ]


def first_entropy(record: Record) -> float:
    return record["train"]["entropy"][0]


def gain(record: Record) -> float:
    return final(record) - record["eval"]["all"][0]


def find(records: Sequence[Record]) -> Findings:
    table = [["warm-up, of the usual", "entropy before RL", "pass@1 before RL", "pass@1 after", "gain"]]
    for share in labels_of(records, "arm"):
        own = where(records, arm=share)
        entropy, before = Mean.of(map(first_entropy, own)), Mean.of(record["eval"]["all"][0] for record in own)
        after, more = Mean.of(map(final, own)), Mean.of(map(gain, own))
        table.append([f"{share:g}", entropy.text(), before.text(".1%"), after.text(".1%"), more.text("+.1%")])
    entropies = [first_entropy(record) for record in records]
    numbers, said = {}, []
    for name, of in (("pass@1 after RL", final), ("what RL gained", gain)):
        outcomes = [of(record) for record in records]
        rank, chance = map(float, spearmanr(entropies, outcomes) if len(set(outcomes)) > 1 else (math.nan, math.nan))
        numbers[name] = {"spearman": rank, "p": chance}
        shown = "< 0.001" if chance < 0.001 else f"{chance:.3f}"
        said.append(
            f"Initial entropy and {name}: rank correlation {rank:+.2f} over {len(records)} runs (p {shown})"
            + ("." if chance < 0.05 else ": no certain relation.")
        )
    warmups, seeds = len(labels_of(records, "arm")), len(labels_of(records, "seed"))
    said.append(
        f"No test of the paper's claim: entropy is made by the length of the warm-up, and a longer one teaches more; and the "
        f"{len(records)} runs are {warmups} warm-ups × {seeds} seeds, not {len(records)} models, so p is too small."
    )
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 2)
    for axes, (name, of) in zip(panels, (("pass@1 after RL", final), ("gain of RL in pass@1", gain)), strict=True):
        finish(axes, name, "mean token entropy before RL (nats)", "share right")
        for place, share in enumerate(labels_of(records, "arm")):
            own = where(records, arm=share)
            at = np.array([[first_entropy(record), of(record)] for record in own])
            axes.scatter(*at.T, color=COLORS[place % len(COLORS)], label=f"{share:g}", s=36)
    panels[0].legend(title="warm-up", loc="best")


EXPERIMENT = Experiment(
    "entropy-predictor",
    "Does a base model's entropy foretell what RL makes of it?",
    runs,
    find,
    draw,
    (10.0, 4.4),
    "points: runs",
)
