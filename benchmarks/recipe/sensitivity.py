"""How much do the recipe's settings matter? A heat map each: TER's target by the start, PSHW's α by difficulty, the recovery
buffer by the size of a sampling round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import finish, heat
from benchmarks.recipe.plan import DYNAMIC, PSHW, RSR, TER, Run, Size, Start
from benchmarks.recipe.records import Record, final, labels_of, last_third, where
from benchmarks.recipe.rsr import batch
from benchmarks.recipe.task import BUCKETS
from benchmarks.recipe.ter import STARTS

TARGETS, ALPHAS = (0.4, 0.5, 0.6, 0.7), (-0.4, -0.3, -0.2, -0.1)
CAPACITIES, ROUNDS = (0, 6, 12, None), (0.5, 1.0, 2.0)
"""Groups that the buffer holds (None: all), and questions of a sampling round as a multiple of N."""
SEEDS = {"target": 1, "alpha": 2, "buffer": 2}


def runs(size: Size) -> list[Run]:
    found = []

    def corners(values: Sequence) -> Sequence:
        return (values[0], values[-1]) if size.quick else values

    def add(labels: dict, start: Start, stage: dict) -> None:
        found.append(Run(labels | {"seed": start.seed}, start, size, (stage,)))

    for seed in range(1, min(size.seeds, SEEDS["target"]) + 1):
        for target in corners(TARGETS):
            for name in corners(tuple(STARTS)):
                start = Start(seed, size.warmup, STARTS[name])
                add({"map": "target", "row": target, "column": name}, start, {"objective": TER | {"entropy_target": target}})
    for seed in range(1, min(size.seeds, SEEDS["alpha"]) + 1):
        for alpha in corners(ALPHAS):
            objective = PSHW | {"pshw_alpha": alpha, "pshw_base": 1 - alpha}
            stage = {"batch": DYNAMIC, "recovery": RSR, "objective": objective}
            add({"map": "alpha", "row": alpha, "column": ""}, Start(seed, size.warmup), stage)
    for seed in range(1, min(size.seeds, SEEDS["buffer"]) + 1):
        for capacity in corners(CAPACITIES):
            for share in corners(ROUNDS):
                recovery = {"enabled": capacity != 0} | ({"capacity": capacity} if capacity else {})
                stage = {"batch": batch(size, share), "recovery": recovery, "objective": PSHW}
                add({"map": "buffer", "row": capacity, "column": share}, Start(seed, size.warmup), stage)
    return found


def cells(records: Sequence[Record], name: str, value) -> tuple[list, list, np.ndarray]:
    """(rows, columns, mean of `value` over the seeds of each cell) of a map."""
    own = where(records, map=name)
    rows, columns = labels_of(own, "row"), labels_of(own, "column")
    table = [[fmean(map(value, where(own, row=row, column=column))) for column in columns] for row in rows]
    return rows, columns, np.array(table)


def by_bucket(records: Sequence[Record]) -> tuple[list[float], np.ndarray]:
    own = where(records, map="alpha")
    rows = labels_of(own, "row")
    table = [[fmean(final(record, bucket) for record in where(own, row=row)) for bucket in (*BUCKETS, "all")] for row in rows]
    return rows, np.array(table)


def drawn_per_group(record: Record) -> float:
    """Raw prompts drawn for each group trained on, over the run: its over-generation."""
    return fmean(record["train"]["over_generation"])


def capacity_name(capacity: int | None) -> str:
    return "all" if capacity is None else str(capacity)


def find(records: Sequence[Record]) -> Findings:
    targets, starts, accuracy = cells(records, "target", final)
    _, _, entropy = cells(records, "target", lambda record: last_third(record["train"]["entropy"]))
    alphas, buckets = by_bucket(records)
    capacities, rounds, drawn = cells(records, "buffer", drawn_per_group)
    table = [["setting", "value", "what came of it"]]
    for row, target in enumerate(targets):
        said = ", ".join(f"{start}: {accuracy[row, at]:.1%} (H {entropy[row, at]:.2f})" for at, start in enumerate(starts))
        table.append(["entropy_target", f"{target}", said])
    for row, alpha in enumerate(alphas):
        values = zip((*BUCKETS, "all"), buckets[row], strict=True)
        table.append(["pshw_alpha", f"{alpha}", ", ".join(f"{name} {value:.1%}" for name, value in values)])
    for row, capacity in enumerate(capacities):
        values = ", ".join(f"rounds of {share:g} N: {drawn[row, at]:.2f}" for at, share in enumerate(rounds))
        table.append(["recovery.capacity", capacity_name(capacity), f"prompts drawn a group trained on: {values}"])
    miss = np.abs(entropy - np.array(targets)[:, None])
    said = [
        f"TER's target: entropy came within {miss.max():.2f} of every target from every start; pass@1 spans {accuracy.min():.1%} "
        f"to {accuracy.max():.1%} over the map, by target (mean over starts) "
        + ", ".join(f"{target} {row.mean():.1%}" for target, row in zip(targets, accuracy, strict=True)) + ".",
        "PSHW's α: pass@1 on all "
        + ", ".join(f"{alpha} {row[-1]:.1%}" for alpha, row in zip(alphas, buckets, strict=True))
        + "; on the hardest " + ", ".join(f"{alpha} {row[-2]:.1%}" for alpha, row in zip(alphas, buckets, strict=True)) + ".",
        "Recovery buffer: prompts drawn a group trained on, none against all kept: "
        + ", ".join(f"rounds of {share:g} N {drawn[0, at]:.2f} → {drawn[-1, at]:.2f}" for at, share in enumerate(rounds)) + ".",
    ]  # fmt: skip
    return Findings(said, table, {"entropy_miss": float(miss.max()), "seeds": SEEDS})


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 3)
    targets, starts, accuracy = cells(records, "target", final)
    finish(panels[0], "pass@1: TER's target", "start", "entropy_target")
    heat(panels[0], [f"{target}" for target in targets], starts, accuracy)
    alphas, buckets = by_bucket(records)
    finish(panels[1], "pass@1: PSHW's α", "bucket", "pshw_alpha")
    heat(panels[1], [f"{alpha}" for alpha in alphas], [*BUCKETS, "all"], buckets)
    capacities, rounds, drawn = cells(records, "buffer", drawn_per_group)
    finish(
        panels[2],
        "Prompts drawn for a group trained on",
        "questions of a sampling round, as a multiple of N",
        "recovery.capacity",
    )
    heat(panels[2], [capacity_name(capacity) for capacity in capacities], [f"{share:g}" for share in rounds], drawn)


EXPERIMENT = Experiment(
    "sensitivity", "How much do the target, α and the buffer matter?", runs, find, draw, (13.0, 4.4), "a cell: mean over seeds"
)
