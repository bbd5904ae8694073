"""`python -m benchmarks.overlap CONFIG [key=value …] [--ranks 2] [--out FILE.json]`: seconds of a step that overlapping saves.

Runs the configuration with its engine set to vllm in each variant, the variants in turn, from the same start, and compares the
seconds of a step, without the first one (which warms up). The engine must stream, so it is vllm; the configuration names the
rest.

| variant       | what is different                                                                     | Algorithm 1 |
|---------------|---------------------------------------------------------------------------------------|-------------|
| sequential    | sample all, then judge all, then decide, then the next round                            | yes         |
| overlapped    | the default: verdicts and rounds that are certain while stragglers decode               | yes         |
| score early   | and old log-probabilities of groups that are certain of their place                     | yes         |
| abort surplus | and decoding ends once N groups are legitimate                                          | no          |
| one step off  | overlapped, and step k + 1 is sampled while step k trains                               | no          |
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kernels.timing import orders, spread
from rollout.errors import InputError
from trainer import cli
from trainer.config_file import load_config
from trainer.environment import provenance
from trainer.metrics import read_metrics

VARIANTS = {
    "sequential": ["engine.overlap=false", "engine.score_early=false"],
    "overlapped": ["engine.score_early=false"],
    "score early": ["engine.score_early=true"],
    "abort surplus": ["engine.score_early=true", "batch.abort_surplus=true"],
    "one step off": ["engine.one_step_off=true"],
}
COLUMNS = (
    "time/step",
    "time/sample",
    "time/reward",
    "time/reward_hidden",
    "time/score",
    "time/score_early",
    "time/update",
    "time/sync",
)
FIRST_STEP = 2
"""Steps before this one warm up."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description="Seconds of a step that overlapping saves.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_intermixed_args(arguments)
    load_config(options.config, [*options.overrides, "engine.kind=vllm"])
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for order in orders(options.variants, options.rounds):
        for name in order:
            print(f"benchmark: {name}", flush=True)
            rows[name] += run(options, VARIANTS[name])
    results = {name: summarize(each) for name, each in rows.items()}
    Console().print(table(results))
    if options.out is not None:
        record = {
            "config": str(options.config), "overrides": options.overrides, "ranks": options.ranks, "variants": results,
            "machine": provenance(),
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def run(options: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """The train rows of one run into a fresh folder."""
    folder = Path(tempfile.mkdtemp(prefix="keju-overlap-"))
    command = [sys.executable, "-m", "trainer.train", str(options.config), *options.overrides, *overrides]
    command += [f"run={folder}", "engine.kind=vllm", "--ranks", str(options.ranks)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks))} | os.environ
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise InputError(f"{options.config}: the run failed: {' '.join(result.stderr.split())[-400:]}")
        return [row for row in read_metrics(folder) if row["kind"] == "train" and row["step"] >= FIRST_STEP]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all runs, with p10 and p90 of the step; mean lengths, to see what a variant does to them."""
    step = spread([row["time/step"] for row in rows])
    tokens = [row["length/mean"] for row in rows if "length/mean" in row]
    return {
        "steps": len(rows),
        **{name: spread([row.get(name, 0.0) for row in rows]).median for name in COLUMNS},
        "step_p10": step.p10,
        "step_p90": step.p90,
        "rounds": spread([row["sampling/rounds"] for row in rows]).median,
        "aborted": max(row["ledger/aborted"] for row in rows),
        "length/mean": sum(tokens) / len(tokens) if tokens else None,
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    shown = Table(
        "variant", "step s", "saved s", *(name.removeprefix("time/") + " s" for name in COLUMNS[1:]), "rounds", "length"
    )
    first = next(iter(results.values()))["time/step"]
    for name, row in results.items():
        length = "–" if row["length/mean"] is None else f"{row['length/mean']:.1f}"
        shown.add_row(
            name, f"{row['time/step']:.2f} ({row['step_p10']:.2f}–{row['step_p90']:.2f})", f"{first - row['time/step']:+.2f}",
            *(f"{row[column]:.2f}" for column in COLUMNS[1:]), f"{row['rounds']:.0f}", length,
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    cli.run(main)
