"""The rule's verdicts beside plain math-verify's, on real pairs of ground truth and prediction; and how fast they come.

    python -m benchmarks.verifier --data ../shared/data

Both judge each pair under a hard deadline, in processes that can be killed; the library reads the two texts between dollar signs.
Every pair on which they differ goes into results/verifier_disagreements.jsonl, with the class of the difference and why our
verdict is right. One that no class describes stands there as `unexplained`, and the command ends with exit code 1. Counts,
agreement with the hand labels and times go into results/verifier.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import statistics
import time
from collections import Counter
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pebble import ProcessPool

from rollout.cli import run
from rollout.environment import provenance, version_of
from rollout.errors import InputError
from rollout.reward.rule import RuleVerifier
from rollout.reward.spawn import MainlessSpawn
from rollout.types import Prompt, Verdict

RESULTS = Path(__file__).parent / "results"
BATCH = 256


@dataclass(frozen=True, slots=True)
class Difference:
    """A class of pairs on which the library errs. right: our verdict. gold, answer: patterns that the stripped texts contain."""

    name: str
    right: bool
    gold: str
    answer: str
    why: str

    def describes(self, gold: str, answer: str, right: bool) -> bool:
        return right == self.right and bool(re.search(self.gold, gold)) and bool(re.search(self.answer, answer))


DIFFERENCES = (
    Difference(
        "power of ten", True, r"^[\d.]+e-?\d+$", r"10|0\.0",
        "the ground truth is a number in scientific notation, and the answer that number; the library reads e as Euler's number",
    ),
    Difference(
        "decimals among symbols", True, r"[a-zA-Z].*0\.0\d*[a-zA-Z]", r"\^",
        "the same formula, 10^5/0.007 being 10^8/7; the library cannot simplify a difference of formulas with decimals to 0",
    ),
    Difference(
        "text inside a formula", False, r"_\{\\text\{.*\}.*\\sqrt", r"\\text",
        r"the library takes all from \text on for a unit and compares the rest; the factors 1/√2 and √(3 - 2√2) = √2 - 1 differ",
    ),
    Difference(
        "E with an index", True, "^E_", "^E_",
        "the same two names in the same order; the library reads E as Euler's number, fails, and compares the bare texts",
    ),
    Difference("inequality for an interval", True, r"^[\[(].*infty", r"^\w\s*[<>]", "k < -5 describes the interval (-∞, -5)"),
    Difference(
        "the same value twice", True, r"^(-?\d+),\1$", ",",
        "two unknowns of the same value in both; the library makes a set with one element of the ground truth",
    ),
    Difference(
        "per cent sign left out", True, r"^[\d.]+$", "%$",
        "the ground truth gives a percentage without its sign; labelled right by hand",
    ),
    Difference("Unicode root", True, r"\\sqrt", "√", r"√53 is \sqrt{53}"),
    Difference(
        "choice with its text", True, r"^\\text\{\([A-H]\)\}$", r"\([A-H]\)",
        "the answer names the right choice and repeats what it says",
    ),
    Difference(
        "variable taken for a unit", True, r"\}t$", "t",
        "t/m in both; the library removes the t of the ground truth as a unit, tonnes, and keeps 1/m",
    ),
)  # fmt: skip


def library(gold: str, answer: str) -> bool:
    """Plain math-verify. Runs in a process of its own."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse, verify

    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


def library_verdicts(pairs: list[tuple[str, str]], seconds: float) -> list[bool | None]:
    """None where it does not end in time."""
    verdicts: list[bool | None] = []
    with ProcessPool(max_workers=os.cpu_count() or 1, context=MainlessSpawn()) as pool:
        from benchmarks import verifier  # this module under its own name, which the processes can import

        for future in [pool.schedule(verifier.library, args=pair, timeout=seconds) for pair in pairs]:
            try:
                verdicts.append(future.result())
            except TimeoutError:
                verdicts.append(None)
    return verdicts


def explain(gold: str, answer: str, right: bool) -> tuple[str, str]:
    for difference in DIFFERENCES:
        if difference.describes(gold, answer, right):
            return difference.name, difference.why
    return "unexplained", ""


def disagreements(rows: list[dict[str, Any]], theirs: list[bool | None], ours: list[Verdict]) -> list[dict[str, Any]]:
    found = []
    for row, library_right, verdict in zip(rows, theirs, ours, strict=True):
        if library_right is None or verdict.right == library_right:
            continue
        name, why = explain(row["gold"].strip(), row["pred"].strip(), verdict.right)
        found.append(
            {
                "id": f"{row['dataset']}/{row['idx']}",
                "gold": row["gold"],
                "prediction": row["pred"],
                "library": library_right,
                "ours": verdict.right,
                "class": name,
                "why": why,
            }
        )
    return found


def throughput(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Batches of real pairs in a shuffled order, none judged before; the first is not counted."""
    rows = list({(row["gold"], row["pred"]): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    seconds, processor = [], []
    with RuleVerifier("math-verify", workers, 10.0) as verifier:
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            batch = [(Prompt("", "", row["gold"]), row["pred"]) for row in rows[first : first + BATCH]]
            before, start = _processor_seconds(), time.perf_counter()
            verifier.verify(batch)
            seconds.append(time.perf_counter() - start)
            processor.append(_processor_seconds() - before)
    return {
        "batch": BATCH,
        "workers": workers,
        "seconds": [round(value, 2) for value in seconds[1:]],
        "seconds_median": round(statistics.median(seconds[1:]), 2),
        "processor_seconds_median": round(statistics.median(processor[1:]), 2),
    }


def _processor_seconds() -> float:
    """Of all processes below this one, with those that they have reaped."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system + time.children_user + time.children_system for time in times)


def read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data names the folder with verifier_pairs/") from None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verifier", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with verifier_pairs/ (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two result files (%(default)s)")
    given = parser.parse_args(arguments)
    rows = read_rows(given.data / "verifier_pairs" / "skythought_pairs.jsonl")
    labelled = read_rows(given.data / "verifier_pairs" / "hard_disagreements_handlabelled.jsonl")
    labels = {(row["gold"], row["pred"]): row["label"] for row in labelled if row["label"] != "ambiguous"}

    speed = throughput(rows, given.workers)
    with RuleVerifier("math-verify", given.workers, 10.0) as verifier:
        ours = verifier.verify([(Prompt("", "", row["gold"]), row["pred"]) for row in rows])
    theirs = library_verdicts([(row["gold"], row["pred"]) for row in rows], 10.0)

    found = disagreements(rows, theirs, ours)
    known = {(row["gold"], row["pred"]): verdict.right for row, verdict in zip(rows, ours, strict=True)}
    agreeing = sum(known[pair] == label for pair, label in labels.items())
    summary = {
        "pairs": len(rows),
        "verdicts": dict(Counter(verdict.reason for verdict in ours)),
        "library_without_verdict": theirs.count(None),
        "disagreements": dict(Counter(row["class"] for row in found)),
        "labelled": len(labels),
        "labelled_agreeing": agreeing,
        "throughput": speed,
        "machine": provenance() | {"math-verify": version_of("math-verify"), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    (given.out / "verifier_disagreements.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (given.out / "verifier.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2, ensure_ascii=False))
    for row in found:
        if row["class"] == "unexplained":
            print(f"unexplained: {row['id']}: {row['prediction']!r} for {row['gold']!r}: ours {row['ours']}")
    return int("unexplained" in summary["disagreements"])


if __name__ == "__main__":
    run(main)
