"""From outcomes to results: figures of each benchmark, results.json, and a table beside the paper's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rollout.evaluate.benchmarks import Benchmark
from rollout.evaluate.record import Outcome
from rollout.evaluate.statistics import bootstrap_interval, pass_at_k, powers_up_to

TIMES = ("seconds", "tokens_per_second", "sessions")
"""Keys of a benchmark's figures that another run of the same evaluation need not repeat."""
FOOTNOTE = "* not measured here: the paper's own figure for Confucius3-Math 14 B (arXiv 2506.18330, table 3)"
PAPER = "Confucius3-Math 14 B (arXiv 2506.18330, table 3)"


def figures(benchmark: Benchmark, outcomes: Collection[Outcome], *, seed: int) -> dict[str, Any]:
    """All shares in [0, 1], lengths in tokens. Unjudged outputs are left out of everything that is about right and wrong, and a
    question without a judged output with them; pass@k is over the questions with k judged outputs or more."""
    judged, right = Counter(), Counter()
    for outcome in outcomes:
        if outcome.right is not None:
            judged[outcome.question] += 1
            right[outcome.question] += outcome.right
    means = [right[question] / judged[question] for question in sorted(judged)]
    interval = bootstrap_interval(means, seed=seed) if means else None
    reasons = Counter(outcome.reason for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    seconds = seconds_of(outcomes)
    asked = sum(judged.values())
    return {
        "title": benchmark.title,
        "questions": len(benchmark.prompts),
        "questions_in_the_set": benchmark.size,
        "k": benchmark.k,
        "outputs": len(outcomes),
        "pass@1": _mean(means),
        "interval_95": interval,
        "pass@k": {str(k): _pass_at(k, judged, right) for k in powers_up_to(max(judged.values(), default=0))},
        "rewarded": sum(outcome.rewarded for outcome in outcomes) / asked if asked else None,
        "unjudged": sum(outcome.right is None for outcome in outcomes),
        "truncated": _share(reasons["truncated"], outcomes),
        "no_verdict_in_time": reasons["timeout"] + reasons["error"],
        "format_failures": _share(reasons["format"], outcomes),
        "repetitive": _share(sum(outcome.repetitive for outcome in outcomes), outcomes),
        "mixed_languages": _share(sum(outcome.mixed for outcome in outcomes), outcomes),
        "reasons": dict(sorted(reasons.items())),
        "mean_length": tokens / len(outcomes) if outcomes else None,
        "longest": max((outcome.tokens for outcome in outcomes), default=None),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "sessions": len({outcome.session for outcome in outcomes}),
        "paper_pass@1": None if benchmark.paper is None else benchmark.paper / 100,
    }


def seconds_of(outcomes: Collection[Outcome]) -> float:
    """Of sampling and grading: in each session, until the last output that was kept."""
    last: dict[int, float] = {}
    for outcome in outcomes:
        last[outcome.session] = max(outcome.at, last.get(outcome.session, 0.0))
    return sum(last.values())


COLUMNS = (
    "benchmark", "questions", "k", "pass@1 (95 %)", "paper", "pass@k", "rewarded", "length", "truncated", "no form", "repeats",
    "mixed", "timed out", "unjudged", "tokens/s",
)  # fmt: skip
HINT = (
    "pass@1: mean correctness of the final answer over k outputs, with the bootstrap interval over questions; pass@k at the "
    "same k; rewarded: what the training's reward calls right, form and all; timed out: outputs whose answer could not be "
    "compared in its time, which count as wrong. The column paper is not measured here: it is the "
    f"published result of {PAPER}."
)


def table(results: dict[str, Any]) -> Table:
    """For a terminal of 80 columns; what does not fit is in the other table."""
    made = Table(title=results["model"]["path"], caption=settings_line(results), box=SIMPLE_HEAD)
    made.padding, made.pad_edge = (0, 1, 0, 0), False
    for column in ("benchmark", "asked", "pass@1", "95 %", "paper*", "length", "cut", "no form", "repeats"):
        made.add_column(column, justify="left" if column == "benchmark" else "right", style="dim" if column == "paper*" else None)
    for each in results["benchmarks"].values():
        row = dict(zip(COLUMNS, _row(each), strict=True))
        score, _, interval = row["pass@1 (95 %)"].partition(" ")
        asked = f"{row['questions'].replace(' of ', '/')} × {row['k']}"
        made.add_row(
            row["benchmark"], asked, score, interval.strip("()"), row["paper"], row["length"], row["truncated"], row["no form"],
            row["repeats"],
        )  # fmt: skip
    return made


def markdown(results: dict[str, Any]) -> str:
    lines = [f"# {results['model']['path']}", "", settings_line(results), ""]
    lines.append("| " + " | ".join(COLUMNS) + " |")
    lines.append("|---|" + "---:|" * (len(COLUMNS) - 1))
    lines += ["| " + " | ".join(row) + " |" for row in map(_row, results["benchmarks"].values())]
    machines = [", ".join(f"{name} {value}" for name, value in each.items()) for each in results["provenance"]]
    machine = "; and ".join(machines)
    return "\n".join([*lines, "", HINT, "", f"Model {results['model']['fingerprint']}. Measured with: {machine}.", ""])


def settings_line(results: dict[str, Any]) -> str:
    decoding = results["settings"]["decoding"]
    how = "greedy" if decoding["greedy"] else f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    return f"{results['settings']['engine']}, {how}, at most {decoding['max_new_tokens']:,} new tokens"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    questions = f"{row['questions']:,}"
    if row["questions"] < row["questions_in_the_set"]:
        questions += f" of {row['questions_in_the_set']:,}"
    score = _percent(row["pass@1"])
    if row["interval_95"] is not None:
        score += f" ({_percent(row['interval_95'][0])}–{_percent(row['interval_95'][1])})"
    return (
        row["title"], questions, str(row["k"]), score, _percent(row["paper_pass@1"], 2),
        _percent(row["pass@k"].get(str(row["k"]))), _percent(row["rewarded"]), _count(row["mean_length"]),
        _percent(row["truncated"]), _percent(row["format_failures"]), _percent(row["repetitive"]),
        _percent(row["mixed_languages"]), _count(row["no_verdict_in_time"]), _count(row["unjudged"]),
        _count(row["tokens_per_second"]),
    )  # fmt: skip


def _pass_at(k: int, judged: Counter[int], right: Counter[int]) -> float | None:
    return _mean([pass_at_k(n, right[question], k) for question, n in sorted(judged.items()) if n >= k])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(count: int, outcomes: Collection[Outcome]) -> float | None:
    return count / len(outcomes) if outcomes else None


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"
