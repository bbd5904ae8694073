"""Does TER hold the entropy that it is told to, from wherever a policy starts? (the paper's figure 3, in small)

Three starts, made by how a teacher words its lines, of which the policy's entropy after the warm-up is a copy: too low, about
right, too high. From each: GRPO; GRPO with the usual entropy bonus, loss - coefficient · H, which is TER with a target above any
entropy; GRPO with TER.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.figures import bars, curves, finish, level
from benchmarks.recipe.plan import GRPO, TER, Run, Size, Start
from benchmarks.recipe.records import Mean, Record, final, labels_of, last_third, paired, where
from benchmarks.recipe.task import Wording

STARTS = {"too low": Wording(sharpness=1.5), "right": Wording(), "too high": Wording(sharpness=0.15, openers=2)}
TARGET, NEAR = TER["entropy_target"], 0.05
OUT_OF_REACH = 100.0
"""nats; |H - this| falls by 1 where H rises by 1, whatever H is."""
BONUS = GRPO | {"entropy_target": OUT_OF_REACH, "entropy_coefficient": 0.06}
ARMS = {"GRPO": GRPO, "GRPO + bonus": BONUS, "GRPO + TER": TER}


def runs(size: Size) -> list[Run]:
    return [
        Run({"arm": arm, "start": start, "seed": seed}, Start(seed, size.warmup, wording), size, ({"objective": objective},))
        for start, wording in STARTS.items()
        for arm, objective in ARMS.items()
        for seed in range(1, size.seeds + 1)
    ]


def held(record: Record) -> bool:
    return abs(last_third(record["train"]["entropy"]) - TARGET) <= NEAR


def find(records: Sequence[Record]) -> Findings:
    table = [["start", "objective", "entropy, first step", "entropy, last third", f"within {NEAR}", "pass@1", "mixed outputs"]]
    for start in labels_of(records, "start"):
        for arm in labels_of(records, "arm"):
            own = where(records, start=start, arm=arm)
            table.append([
                start, arm,
                Mean.of(record["train"]["entropy"][0] for record in own).text(),
                Mean.of(last_third(record["train"]["entropy"]) for record in own).text(),
                f"{sum(map(held, own))} of {len(own)}",
                Mean.of(map(final, own)).text(".1%"),
                Mean.of(last_third(record["train"]["mixed"]) for record in own).text(".1%"),
            ])  # fmt: skip
    numbers = {}
    for arm in labels_of(records, "arm"):
        own = where(records, arm=arm)
        numbers[arm] = {
            "held": sum(map(held, own)), "runs": len(own),
            "mixed": fmean(last_third(record["train"]["mixed"]) for record in own),
            "pass_at_1": fmean(map(final, own)),
        }  # fmt: skip
    held_of = {arm: f"{each['held']} of {each['runs']}" for arm, each in numbers.items()}
    said = [
        f"With TER the mean entropy of the last third is within {NEAR} of the target {TARGET} in {held_of['GRPO + TER']} runs; "
        f"without it in {held_of['GRPO']} (GRPO) and {held_of['GRPO + bonus']} (entropy bonus)."
    ]
    for start in labels_of(records, "start"):
        pair = where(records, start=start, arm="GRPO"), where(records, start=start, arm="GRPO + TER")
        gain = paired(*pair, final)
        mixed = paired(*pair, lambda record: last_third(record["train"]["mixed"]))
        numbers[f"TER - GRPO, {start}"] = {"pass_at_1": [gain.mean, gain.half], "mixed": [mixed.mean, mixed.half]}
        said.append(
            f"From a start that is {start}, TER against GRPO changes pass@1 by {gain.change()} and the share of outputs that mix "
            f"languages by {mixed.change()}."
        )
    return Findings(said, table, numbers)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    panels = figure.subplots(2, 3)
    starts, arms = labels_of(records, "start"), labels_of(records, "arm")
    for axes, start in zip(panels[0], starts, strict=True):
        finish(axes, f"Entropy from a start that is {start}", "step", "mean token entropy (nats)")
        curves(axes, {arm: where(records, start=start, arm=arm) for arm in arms}, "entropy")
        level(axes, TARGET, f"target ± {NEAR}", NEAR)
    tops = [axes.get_ylim()[1] for axes in panels[0]]
    for axes in panels[0]:
        axes.set_ylim(0, max(tops))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms) + 1)
    cells = {arm: [where(records, start=start, arm=arm) for start in starts] for arm in arms}
    finish(panels[1][0], "Held-out pass@1 at the end", "start", "share right")
    bars(panels[1][0], starts, {arm: [Mean.of(map(final, own)) for own in row] for arm, row in cells.items()})
    finish(panels[1][1], "Accuracy in training, all starts", "step", "share right")
    curves(panels[1][1], {arm: where(records, arm=arm) for arm in arms}, "accuracy", width=5)
    finish(panels[1][2], "Outputs that mix languages, last third", "start", "share")
    bars(panels[1][2], starts, {
        arm: [Mean.of(last_third(record["train"]["mixed"]) for record in own) for own in row] for arm, row in cells.items()
    })  # fmt: skip


EXPERIMENT = Experiment("ter", "Does TER hold a policy's entropy, and what does that bring?", runs, find, draw, (13.0, 7.0))
