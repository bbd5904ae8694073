"""Do the three ideas carry over to a task that is not mathematics? Counting a letter in a word, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.recipe import rsr
from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import curves, evaluations, finish, level, over
from benchmarks.recipe.plan import DAPO, DYNAMIC, GRPO, PSHW, RSR, TER, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, last_third, paired, where

SEEDS = 3
CONTEXT = 96
ARMS = {
    "GRPO": {"objective": GRPO},
    "GRPO + TER": {"objective": TER},
    "DAPO": {"batch": DYNAMIC, "objective": DAPO},
    "DAPO + RSR": {"batch": DYNAMIC, "recovery": RSR, "objective": DAPO},
    "DAPO + RSR + PSHW": {"batch": DYNAMIC, "recovery": RSR, "objective": PSHW},
}


def runs(size: Size) -> list[Run]:
    return [
        Run({"arm": arm, "seed": seed}, Start(seed, size.warmup, task="letters"), size, (stage,), CONTEXT)
        for arm, stage in ARMS.items()
        for seed in range(1, min(size.seeds, SEEDS) + 1)
    ]


def find(records: Sequence[Record]) -> Findings:
    table = [["recipe", "entropy, last third", "prompts drawn", "pass@1, hard", "pass@1, all"]]
    for arm in labels_of(records, "arm"):
        own = where(records, arm=arm)
        table.append([
            arm, Mean.of(last_third(record["train"]["entropy"]) for record in own).text(),
            Mean.of(record["train"]["drawn"][-1] for record in own).text(",.0f"),
            *(Mean.of(final(record, name) for record in own).text(".1%") for name in ("hard", "all")),
        ])  # fmt: skip
    away = {arm: Mean.of(abs(last_third(r["train"]["entropy"]) - TER["entropy_target"]) for r in where(records, arm=arm))
            for arm in ("GRPO", "GRPO + TER")}  # fmt: skip
    price = paired(where(records, arm="GRPO"), where(records, arm="GRPO + TER"), final)
    saved = Mean.of(rsr.prompts_saved(records, "DAPO + RSR", "DAPO"))
    fewer = Mean.of(rsr.fewer_drawn(records, "DAPO + RSR", "DAPO"))
    pairs = where(records, arm="DAPO + RSR"), where(records, arm="DAPO + RSR + PSHW")
    hard, whole = (paired(*pairs, lambda record, name=name: final(record, name)) for name in ("hard", "all"))
    said = [
        f"TER: the last third's entropy is {away['GRPO + TER'].text()} from the target, {away['GRPO'].text()} without it; "
        f"against GRPO it changes pass@1 by {price.change()}.",
        f"RSR saved {saved.change(unit='%')} of the raw prompts to the same training accuracy, and "
        f"{fewer.change(unit='%')} for the same number of steps.",
        f"PSHW against R - μ changes pass@1 by {hard.change()} on the hardest and by {whole.change()} on all.",
    ]
    numbers = {
        "entropy_miss": {arm: mean.mean for arm, mean in away.items()},
        "saved": saved.mean,
        "pshw": [hard.mean, whole.mean],
    }
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(1, 3)
    arms = {arm: where(records, arm=arm) for arm in labels_of(records, "arm")}
    finish(panels[0], "TER", "step", "mean token entropy (nats)")
    curves(panels[0], {arm: arms[arm] for arm in ("GRPO", "GRPO + TER")}, "entropy")
    level(panels[0], TER["entropy_target"], "target")
    panels[0].legend(loc="best")
    finish(panels[1], "RSR", "raw prompts drawn", "share right in training")
    over(panels[1], {arm: arms[arm] for arm in ("DAPO", "DAPO + RSR")}, "drawn")
    panels[1].legend(loc="best")
    finish(panels[2], "PSHW, the hardest problems", "step", "held-out pass@1")
    evaluations(panels[2], {arm: arms[arm] for arm in ("DAPO + RSR", "DAPO + RSR + PSHW")}, "hard")
    panels[2].legend(loc="best")


EXPERIMENT = Experiment("transfer", "Do the three ideas carry over to counting letters?", runs, find, draw, (13.0, 4.4))
