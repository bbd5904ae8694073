"""What was kept, what was removed and why: numbers for each step and source, and examples. Deterministic: no times, no dates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from curation.options import Options
from curation.store import Rows

if TYPE_CHECKING:
    from curation.pipeline import Done

EXAMPLES = 3
"""Examples of each reason in each step, evenly spread over what was removed for it."""
EXCERPT = 300


@dataclass(frozen=True, slots=True)
class Report:
    """data: the JSON report. seconds: step → seconds, for the terminal alone."""

    data: dict[str, Any]
    seconds: dict[str, float]


def make(
    start: Rows, kept: Rows, done: Sequence[Done], notes: dict[str, Any], benchmarks: Sequence[str], options: Options
) -> Report:
    """start: the rows read; kept: those left; notes: what `ingest` gave."""
    numbers, sources = _sources(start)
    by_id = {}
    wanted = {step.removed.partners[place] for step in done for places in _examples(step).values() for place in places}
    for frame in start.batches("id", "question"):
        by_id |= {name: question for name, question in frame.iter_rows() if name in wanted}
    steps = [_step(start, step, by_id) for step in done]
    read, quarantined = notes["read"], notes["quarantined"]
    left = Counter(sources[kept.numbers].tolist())
    data = {
        "rows_read": sum(read.values()),
        "rows_quarantined": sum(quarantined.values()),
        "rows_kept": len(kept),
        "for_judge": len({number for step in done for number in step.for_judge} & set(kept.numbers.tolist())),
        "sources": {
            name: {"read": read[name], "quarantined": quarantined.get(name, 0), "kept": left.get(numbers[name], 0)}
            for name in read
            if name in numbers
        },
        "quarantine": notes["reasons"],
        "flags": notes["flags"],
        "maps": notes["maps"],
        "benchmarks": list(benchmarks),
        "steps": steps,
        "options": {name: value for name, value in options.deciding(*options.__dataclass_fields__).items() if name != "threads"},
    }
    for source in data["sources"].values():
        source["removed"] = source["read"] - source["quarantined"] - source["kept"]
    seconds = {"read": notes["seconds"]} | {step.name: step.seconds for step in done}
    return Report(data, seconds)


def _sources(start: Rows) -> tuple[dict[str, int], np.ndarray]:
    """(source → its number, each row's source number)."""
    numbers: dict[str, int] = {}
    codes = []
    for frame in start.batches("source"):
        codes.append(np.array([numbers.setdefault(name, len(numbers)) for name in frame["source"].to_list()], np.int32))
    return numbers, np.concatenate(codes) if codes else np.zeros(0, np.int32)


def _examples(step: Done) -> dict[str, list[int]]:
    """Reason → places in the step's removed rows."""
    found = {}
    for reason in sorted(set(step.removed.reasons.tolist())):
        places = np.flatnonzero(step.removed.reasons == reason)
        found[reason] = places[np.linspace(0, len(places) - 1, min(EXAMPLES, len(places))).astype(int)].tolist()
    return found


def _step(start: Rows, step: Done, by_id: dict[str, str]) -> dict[str, Any]:
    examples = []
    names = start.at(step.removed.numbers).frame("source")["source"].to_list() if len(step.removed.numbers) else []
    for reason, places in _examples(step).items():
        rows = start.at(step.removed.numbers[places]).frame("id", "question", "answer")
        for place, (name, question, answer) in zip(places, rows.iter_rows(), strict=True):
            partner, score = step.removed.partners[place], float(step.removed.scores[place])
            example = {"id": name, "reason": reason, "question": _short(question), "answer": _short(answer or "")}
            if partner:
                example |= {"partner": partner, "partner_question": _short(by_id.get(partner, ""))}
            examples.append(example if score != score else example | {"score": score})
    return {
        "name": step.name,
        "title": step.title,
        "in": step.entered,
        "out": step.left,
        "removed": step.entered - step.left,
        "reasons": dict(sorted(Counter(step.removed.reasons.tolist()).items())),
        "by_source": dict(sorted(Counter(names).items())),
        "notes": step.notes,
        "examples": examples,
    }


def _short(text: str) -> str:
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def tables(made: Report) -> list[Table]:
    """The report for a terminal: the steps, then the sources."""
    data = made.data
    steps = Table(title="Curation", title_justify="left")
    for name in ("step", "in", "removed", "out", "why", "s"):
        steps.add_column(name, justify="left" if name in ("step", "why") else "right")
    good = data["rows_read"] - data["rows_quarantined"]
    quarantine = ", ".join(f"{reason} {count:,}" for reason, count in list(data["quarantine"].items())[:3])
    steps.add_row(
        "read and clean",
        f"{data['rows_read']:,}",
        f"{data['rows_quarantined']:,}",
        f"{good:,}",
        quarantine,
        f"{made.seconds['read']:.1f}",
    )
    for step in data["steps"]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in step["reasons"].items())
        steps.add_row(
            step["title"], f"{step['in']:,}", f"{step['removed']:,}", f"{step['out']:,}", why, f"{made.seconds[step['name']]:.1f}"
        )
    sources = Table(title="Sources", title_justify="left")
    for name in ("source", "read", "quarantined", "removed", "kept"):
        sources.add_column(name, justify="left" if name == "source" else "right")
    for name, counts in data["sources"].items():
        sources.add_row(name, *(f"{counts[column]:,}" for column in ("read", "quarantined", "removed", "kept")))
    return [steps, sources]
