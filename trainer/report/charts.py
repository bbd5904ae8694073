"""What the page's charts show: which column of the metrics rows, under which name, in which unit. No values and no drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CONSTANT_STEPS = 5
"""From so many steps on, a chart in which nothing ever changes is told in a line and not drawn."""


@dataclass(frozen=True, slots=True)
class Series:
    """key: of a train row. role: a "line", smoothed; a "level", drawn as it is and dashed (a target, a bound)."""

    key: str
    label: str
    role: str = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """unit: "share" (0 to 1, shown in percent) or what stands behind the numbers. kind: "lines", or "stack" of shares. zero:
    whether the axis begins at 0."""

    title: str
    unit: str
    about: str
    series: tuple[Series, ...]
    kind: str = "lines"
    zero: bool = False
    evaluations: bool = False


def _lines(*pairs: tuple[str, str]) -> tuple[Series, ...]:
    return tuple(Series(key, label) for key, label in pairs)


CHARTS = (
    Chart(
        "Accuracy",
        "share",
        "right among all samples of a step; and pass@1 of each evaluation set",
        _lines(("reward/accuracy", "training samples")),
        evaluations=True,
    ),
    Chart(
        "Entropy",
        "nats",
        "mean token entropy of the policy, and the target that it is held to",
        (Series("entropy/mean", "entropy"), Series("entropy/target", "target", "level")),
    ),
    Chart(
        "Response length",
        "tokens",
        "mean over a step's samples, and over the right and the wrong ones apart; the limit is of prompt and response together",
        (
            *_lines(("length/mean", "mean"), ("length/right", "right"), ("length/wrong", "wrong")),
            Series("context", "context limit", "level"),
        ),
    ),
    Chart("Verdicts", "share", "the reasons of a step's verdicts", (), kind="stack", zero=True),
    Chart(
        "Sampler against trainer",
        "nats",
        "|sampled − recomputed log-probability| of a token, its mean and the bound of the mean's alarm",
        (Series("mismatch/mean", "mean"), Series("mismatch/mean_bound", "bound", "level")),
        zero=True,
    ),
    Chart(
        "KL",
        "nats",
        "of the policy from the weights that scored, and from the reference",
        _lines(("kl/old_new", "scored → updated"), ("kl/reference", "from the reference")),
    ),
    Chart(
        "Clipped tokens",
        "share",
        "tokens whose ratio was clipped low or high; and whose importance weight was capped",
        _lines(("clip/low", "low"), ("clip/high", "high"), ("tis/capped", "importance weight capped")),
        zero=True,
    ),
    Chart("Ratio", "", "least and greatest probability ratio of a token", _lines(("ratio/max", "max"), ("ratio/min", "min"))),
    Chart("Gradient norm", "", "before clipping, mean of a step's mini-batches", _lines(("grad_norm", "norm")), zero=True),
    Chart(
        "Loss",
        "",
        "of the policy, and what the entropy term and the reference's KL add",
        _lines(("loss/policy", "policy"), ("loss/entropy", "entropy term"), ("loss/kl", "KL term")),
    ),
    Chart(
        "Over-generation",
        "× the batch",
        "groups sampled for each group trained on",
        _lines(("sampling/over_generation", "groups sampled / trained on")),
        zero=True,
    ),
    Chart("Recovery buffer", "groups", "waiting after the step", _lines(("recovery/size", "waiting")), zero=True),
    Chart("Mixed languages", "share", "samples that mix languages", _lines(("language/mixed", "mixed")), zero=True),
    Chart("Learning rate", "", "of the step's last update", _lines(("lr", "rate")), zero=True),
    Chart(
        "Throughput",
        "tokens/s",
        "tokens of a phase by that phase's seconds",
        _lines(("rate/sample", "sampling"), ("rate/update", "update")),
        zero=True,
    ),
    Chart(
        "Memory",
        "GiB",
        "resident memory of rank 0: its peak, and what it held at the last checkpoint",
        _lines(("memory/rss_gib", "peak"), ("memory/held_gib", "held")),
        zero=True,
    ),
)


def choose_charts(columns: Sequence[Mapping[str, Sequence[float | None]]], evaluated: bool) -> dict[str, list]:
    """What to draw of these runs: {"charts": […], "constant": [[title, key's label, value], …], "missing": titles}.

    columns: of each run, by key; a key of a run that has no number is absent. A series that no run has is left out.
    """
    reasons = sorted({key for each in columns for key in each if key.startswith("verdict/")}, key=_reason_order)
    found: dict[str, list] = {"charts": [], "constant": [], "missing": []}
    for chart in CHARTS:
        series = chart.series if chart.kind == "lines" else tuple(Series(key, key.removeprefix("verdict/")) for key in reasons)
        series = tuple(each for each in series if any(each.key in run for run in columns))
        lines = [each for each in series if each.role == "line"]
        if not lines and not (chart.evaluations and evaluated):
            found["missing"].append(chart.title)
            continue
        values = [_only_value([run.get(each.key, ()) for run in columns]) for each in lines]
        if chart.kind == "lines" and not chart.evaluations and None not in values:
            found["constant"] += [[chart.title, each.label, value] for each, value in zip(lines, values, strict=True)]
            continue
        found["charts"].append(asdict(chart) | {"series": [asdict(each) for each in series]})
    return found


_REASONS = ("right", "process", "wrong", "truncated", "format", "repetition", "timeout", "error", "unjudged")


def _reason_order(key: str) -> tuple[int, str]:
    reason = key.removeprefix("verdict/")
    return (_REASONS.index(reason) if reason in _REASONS else len(_REASONS), reason)


def _only_value(runs: Sequence[Sequence[float | None]]) -> float | None:
    """The one value that all steps of all runs have, None where they differ or are too few to tell."""
    values: list[Any] = [value for run in runs for value in run if value is not None]
    return values[0] if len(values) >= CONSTANT_STEPS and len(set(values)) == 1 else None
