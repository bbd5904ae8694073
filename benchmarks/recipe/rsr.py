"""What does Recent Sample Recovery save? (the paper's figure 4, in small)

DAPO discards the surplus of a step; RSR lets it open the next step's batch. Beside them RSR whose tokens are weighted by
min(π_trainer / π_sampler, 2) (`objective.tis_cap`), and RSR against a queue in which a group waits as long as it takes
(`recovery.max_age`), these two with rounds of 2 N questions: where a round has N, the surplus is smaller than N and opens the
next batch whole, so that nothing ever expires and the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import curves, finish, over
from benchmarks.recipe.plan import DYNAMIC, PSHW, RSR, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, by_seed, final, labels_of, paired, savings, where

WITHOUT, WITH, WEIGHTED = "discarded", "RSR", "RSR, importance weights"
LARGE, QUEUE = "RSR, rounds of 2 N", "unbounded queue, rounds of 2 N"
ARMS = {
    WITHOUT: (1, {"enabled": False}, PSHW),
    WITH: (1, RSR, PSHW),
    WEIGHTED: (1, RSR, PSHW | {"tis_cap": 2.0}),
    LARGE: (2, RSR, PSHW),
    QUEUE: (2, RSR | {"max_age": None}, PSHW),
}
"""Questions of a sampling round as a multiple of N, recovery, objective."""


def runs(size: Size) -> list[Run]:
    return [
        Run(
            {"arm": arm, "seed": seed}, Start(seed, size.warmup), size,
            ({"batch": batch(size, rounds), "recovery": recovery, "objective": objective},),
        )
        for arm, (rounds, recovery, objective) in ARMS.items()
        for seed in range(1, size.seeds + 1)
    ]  # fmt: skip


def batch(size: Size, rounds: float) -> dict[str, Any]:
    return DYNAMIC if rounds == 1 else DYNAMIC | {"prompts_per_round": max(1, round(rounds * size.groups))}


def prompts_saved(records: Sequence[Record], arm: str, against: str = WITHOUT) -> list[float]:
    return savings(where(records, arm=arm), where(records, arm=against), "drawn")


def fewer_drawn(records: Sequence[Record], arm: str, against: str = WITHOUT) -> list[float]:
    """Share of the prompts that `arm` did not draw in the same number of steps, seed by seed."""
    pairs = by_seed(where(records, arm=against), where(records, arm=arm))
    return [1 - own["train"]["drawn"][-1] / other["train"]["drawn"][-1] for other, own in pairs]


def find(records: Sequence[Record]) -> Findings:
    table = [["surplus", "prompts drawn", "pass@1", "over-generation", "buffer, groups", "prompts saved at equal accuracy"]]
    numbers = {}
    for arm in labels_of(records, "arm"):
        own = where(records, arm=arm)
        saved = Mean.of(prompts_saved(records, arm)) if arm != WITHOUT else None
        drawn = Mean.of(record["train"]["drawn"][-1] for record in own)
        table.append([
            arm, drawn.text(",.0f"), Mean.of(map(final, own)).text(".1%"),
            Mean.of(fmean(record["train"]["over_generation"]) for record in own).text(".2f"),
            Mean.of(fmean(record["train"]["buffer"]) for record in own).text(".1f"),
            saved.text(".1%") if saved else "",
        ])  # fmt: skip
        numbers[arm] = {"drawn": drawn.mean, "pass_at_1": fmean(map(final, own))}
        if saved:
            numbers[arm] |= {"saved": [saved.mean, saved.half]}
    saved = Mean.of(prompts_saved(records, WITH))
    fewer = Mean.of(fewer_drawn(records, WITH))
    said = [
        f"To reach the same training accuracy RSR drew {saved.text('.1%')} fewer raw prompts than DAPO that discards its surplus"
        + ("." if saved.sure or not math.isfinite(saved.half) else ", which is not certainly more than none.")
        + f" For the same number of steps it drew {fewer.text('.1%')} fewer."
    ]
    for arm, against in ((WEIGHTED, WITH), (QUEUE, LARGE)):
        gain = paired(where(records, arm=against), where(records, arm=arm), final)
        more = Mean.of(prompts_saved(records, arm, against))
        said.append(
            f"{arm[0].upper()}{arm[1:]}, against {against}: pass@1 {gain.change()}; prompts saved at equal accuracy "
            f"{more.change(unit='%')}."
        )
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(2, 3)
    arms = {arm: where(records, arm=arm) for arm in labels_of(records, "arm")}
    main = {arm: arms[arm] for arm in (WITHOUT, WITH)}
    finish(panels[0][0], "Accuracy over steps", "step", "share right in training")
    curves(panels[0][0], main, "accuracy", width=5)
    finish(panels[0][1], "Accuracy over data", "raw prompts drawn", "share right in training")
    over(panels[0][1], main, "drawn")
    finish(panels[0][2], "Raw prompts drawn", "step", "prompts so far")
    curves(panels[0][2], arms, "drawn")
    panels[0][2].yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*panels[0][2].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    finish(panels[1][0], "Accuracy over data, all five", "raw prompts drawn", "share right in training")
    over(panels[1][0], arms, "drawn")
    finish(panels[1][1], "Over-generation", "step", "groups sampled / groups trained on")
    curves(panels[1][1], arms, "over_generation", width=5)
    finish(panels[1][2], "Recovery buffer after a step", "step", "groups (symlog: linear below 10)")
    curves(panels[1][2], arms, "buffer", width=5)
    panels[1][2].set_yscale("symlog", linthresh=10)
    panels[1][2].yaxis.set_major_formatter("{x:,.0f}")


EXPERIMENT = Experiment("rsr", "What does recovering recent samples save?", runs, find, draw, (13.0, 7.0))
