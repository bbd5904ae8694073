"""What a run came to, in a few numbers: `summary.json` and a short table at its end."""

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from rich.table import Table

from trainer.metrics import LEDGER_FATES, PHASES, number, replace_text

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """pass@1 (0 to 1) of `count` prompts, `k` samples each, after `step` finished steps."""

    step: int
    pass_at_1: float
    count: int | None
    k: int | None


@dataclass(frozen=True, slots=True)
class EvaluationChange:
    """The first and the last evaluation of one set; the same where there was only one."""

    name: str
    first: EvaluationPoint
    last: EvaluationPoint


@dataclass(frozen=True, slots=True)
class StageSteps:
    """How many steps of a stage are finished. stage: from 0."""

    stage: int
    name: str
    steps: int


@dataclass(frozen=True, slots=True)
class EntropyHold:
    """Mean entropy (nats) over the last third of the first stage's steps, where regularisation has had time to act, and the
    target then; None without one. steps: how many it is the mean of."""

    mean: float
    target: float | None
    steps: int


@dataclass(frozen=True, slots=True)
class Summary:
    """seconds: by phase over the run, "step" being the steps as wholes. ledger: prompts by fate and "drawn", at the last step.
    Rates are tokens per second of the phase's own time; None where no row has both time and rate."""

    steps: int
    stages: tuple[StageSteps, ...]
    evaluations: tuple[EvaluationChange, ...]
    entropy: EntropyHold | None
    ledger: dict[str, int]
    seconds: dict[str, float]
    sample_tokens_per_second: float | None
    update_tokens_per_second: float | None


def summarize(rows: list[dict], *, eval_name: str | None = None) -> Summary:
    """Rows as `read_metrics` gives them, of a run in any state, also without a finished step. eval_name: this evaluation set
    only."""
    train = sorted((row for row in rows if row["kind"] == "train"), key=lambda row: row["step"])
    evals = sorted((row for row in rows if row["kind"] == "eval"), key=lambda row: row["step"])
    names = sorted({str(row.get("name", "")) for row in evals} if eval_name is None else {eval_name})
    changes = (_change(name, evals) for name in names)
    last = train[-1] if train else {}
    ledger = {fate: number(last, f"ledger/{fate}") for fate in ("drawn", *LEDGER_FATES)}
    return Summary(
        steps=len(train),
        stages=_stages(train),
        evaluations=tuple(change for change in changes if change is not None),
        entropy=_entropy(train),
        ledger={fate: int(count) for fate, count in ledger.items() if count is not None},
        seconds=_seconds(train, evals),
        sample_tokens_per_second=_mean_rate(train, "sample"),
        update_tokens_per_second=_mean_rate(train, "update"),
    )


def table(summary: Summary, figures: Path) -> Table:
    """The summary for a person. figures: the folder of the pictures, named in the last line."""
    grid = Table(title="Run", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    stages = ", ".join(f"{stage.name or stage.stage + 1} {stage.steps}" for stage in summary.stages)
    grid.add_row("steps", f"{summary.steps}" + (f" ({stages})" if stages else ""))
    for change in summary.evaluations:
        grid.add_row(change.name, _words_of_change(change))
    if summary.entropy is not None:
        target = summary.entropy.target
        words = f"{summary.entropy.mean:.3f}" + (f", target {target:g}" if target is not None else "")
        grid.add_row("entropy", f"{words} (last third of the first stage)")
    if summary.ledger:
        grid.add_row("prompts", " · ".join(f"{fate} {count:,}" for fate, count in summary.ledger.items()))
    if summary.seconds:
        grid.add_row("seconds", " · ".join(f"{phase} {seconds:,.1f}" for phase, seconds in summary.seconds.items()))
    rates = (("sampling", summary.sample_tokens_per_second), ("update", summary.update_tokens_per_second))
    words = " · ".join(f"{name} {rate:,.0f}" for name, rate in rates if rate is not None)
    if words:
        grid.add_row("tokens/s", words)
    grid.add_row("figures", str(figures))
    return grid


def write_summary(run_dir: Path, summary: Summary, machine: dict[str, str] | None = None) -> Path:
    """Write `run_dir/summary.json`, beside and renamed; returns its path. machine: `trainer.environment.provenance`."""
    path = Path(run_dir) / SUMMARY_FILE
    replace_text(path, json.dumps(asdict(summary) | {"machine": machine}, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _change(name: str, evals: list[dict]) -> EvaluationChange | None:
    own = [row for row in evals if str(row.get("name", "")) == name and number(row, "pass@1") is not None]
    return EvaluationChange(name, _point(own[0]), _point(own[-1])) if own else None


def _point(row: dict) -> EvaluationPoint:
    count, k = number(row, "count"), number(row, "k")
    return EvaluationPoint(
        row["step"], number(row, "pass@1"), None if count is None else int(count), None if k is None else int(k)
    )


def _words_of_change(change: EvaluationChange) -> str:
    words = f"pass@1 {change.first.pass_at_1:.1%} at step {change.first.step}"
    if change.last.step != change.first.step:
        words += f" → {change.last.pass_at_1:.1%} at step {change.last.step}"
    if change.last.count is not None and change.last.k is not None:
        words += f" ({change.last.count:,} prompts × {change.last.k})"
    return words


def _stages(train: list[dict]) -> tuple[StageSteps, ...]:
    by_stage = groupby(train, key=_stage)
    return tuple(StageSteps(stage, name, len(list(rows))) for (stage, name), rows in by_stage)


def _stage(row: dict) -> tuple[int, str]:
    return int(number(row, "stage") or 0), str(row.get("stage_name", ""))


def _entropy(train: list[dict]) -> EntropyHold | None:
    first_stage = [row for row in train if _stage(row) == _stage(train[0])]
    last_third = first_stage[-(-2 * len(first_stage) // 3) :] or first_stage[-1:]
    entropies = [number(row, "entropy/mean") for row in last_third]
    known = [entropy for entropy in entropies if entropy is not None]
    if not known:
        return None
    return EntropyHold(fmean(known), number(last_third[-1], "entropy/target"), len(known))


def _seconds(train: list[dict], evals: list[dict]) -> dict[str, float]:
    # An evaluation before training belongs to no step, so evaluations are counted by their own rows where these say their time.
    rows_of = dict.fromkeys(("step", *PHASES), train)
    if any(number(row, "time/evaluate") for row in evals):
        rows_of["evaluate"] = evals
    seconds = {phase: sum(number(row, f"time/{phase}") or 0.0 for row in rows) for phase, rows in rows_of.items()}
    return {phase: total for phase, total in seconds.items() if total > 0}


def _mean_rate(train: list[dict], phase: str) -> float | None:
    """All tokens over all seconds: a mean of the steps' rates would weigh a short step like a long one."""
    pairs = [(number(row, f"rate/{phase}"), number(row, f"time/{phase}")) for row in train]
    known = [(rate, seconds) for rate, seconds in pairs if rate is not None and seconds]
    whole = sum(seconds for _rate, seconds in known)
    return sum(rate * seconds for rate, seconds in known) / whole if whole else None
