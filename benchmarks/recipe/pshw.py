"""Does Policy-Specific Hardness Weighting help where it is hard? (R - μ)(α μ + 1.256) against R - μ and against GRPO's division
by the standard deviation, all else DAPO with RSR."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import bars, evaluations, finish
from benchmarks.recipe.plan import DAPO, DYNAMIC, PSHW, RSR, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, paired, where
from benchmarks.recipe.task import BUCKETS

WITH = "PSHW"
ARMS = {"R - μ": DAPO, "(R - μ) / std": DAPO | {"advantage": "grpo"}, WITH: PSHW}


def runs(size: Size) -> list[Run]:
    return [
        Run(
            {"arm": arm, "seed": seed}, Start(seed, size.warmup), size,
            ({"batch": DYNAMIC, "recovery": RSR, "objective": objective},),
        )
        for arm, objective in ARMS.items()
        for seed in range(1, size.seeds + 1)
    ]  # fmt: skip


def find(records: Sequence[Record]) -> Findings:
    arms = labels_of(records, "arm")
    table = [["advantage", *BUCKETS, "all"]]
    for arm in arms:
        own = where(records, arm=arm)
        table.append([arm, *(Mean.of(final(record, name) for record in own).text(".1%") for name in (*BUCKETS, "all"))])
    numbers, said = {}, []
    for arm in arms:
        if arm == WITH:
            continue
        gains = {
            name: paired(where(records, arm=arm), where(records, arm=WITH), lambda record, name=name: final(record, name))
            for name in ("hard", "all")
        }
        numbers[f"PSHW - {arm}"] = {name: [gain.mean, gain.half] for name, gain in gains.items()}
        said.append(
            f"PSHW against {arm} changes pass@1 by {gains['hard'].change()} on the hardest problems and by "
            f"{gains['all'].change()} on all."
        )
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 3)
    arms = {arm: where(records, arm=arm) for arm in labels_of(records, "arm")}
    finish(panels[0], "Held-out pass@1 at the end", "bucket", "share right")
    bars(panels[0], BUCKETS, {arm: [Mean.of(final(r, name) for r in own) for name in BUCKETS] for arm, own in arms.items()})
    panels[0].legend(loc="upper right")
    finish(panels[1], "The hardest problems", "step", "held-out pass@1")
    evaluations(panels[1], arms, "hard")
    finish(panels[2], "All problems", "step", "held-out pass@1")
    evaluations(panels[2], arms, "all")


EXPERIMENT = Experiment("pshw", "Does hardness weighting help where it is hard?", runs, find, draw, (13.0, 4.4))
