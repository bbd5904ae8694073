"""`python -m benchmarks.recipe NAME… | all [--quick]`: the paper's claims in small, on a CPU, over several seeds.

Each experiment trains a tiny policy a few times through the real trainer (`work`), and writes OUT/NAME.json (every run's curves,
seeds, configuration, commit and time), OUT/NAME.png, and OUT/NAME.md: what was found in plain sentences, and a table. What is
done stays in WORK: stopped at any time, the same command goes on. Runs that two experiments share are trained once. `--draw`
makes figure and table anew from what OUT holds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.recipe import coefficient, length, predictor, pshw, rsr, sensitivity, stages, ter, transfer
from benchmarks.recipe.experiment import Experiment, Findings
from benchmarks.recipe.plan import FULL, QUICK, Run, Size, config
from benchmarks.recipe.records import Record, record_of
from benchmarks.recipe.work import do
from rollout.cli import Parser, number, run
from rollout.environment import check_packages, provenance
from rollout.errors import InputError
from trainer.metrics import replace_text

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (ter, rsr, pshw, length, sensitivity, coefficient, transfer, stages, predictor)
}
OUT = Path("benchmarks/results/recipe")
count = number("count", int, lambda value: value >= 1)


def main(arguments: list[str]) -> int:
    options = checked(parser().parse_args(arguments))
    if not options.draw:
        plans = {name: EXPERIMENTS[name].runs(options.size) for name in options.names}
        began = time.perf_counter()
        do([each for plan in plans.values() for each in plan], options.work, options.jobs)
        options.out.mkdir(parents=True, exist_ok=True)
        records = []
        for name, plan in plans.items():
            content = result(EXPERIMENTS[name], plan, options.size, options.work)
            replace_text(options.out / f"{name}.json", json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
            records += content["runs"]
        spent = ", ".join(f"{what} {seconds:,.0f} s" for what, seconds in seconds_of(records).items())
        print(f"on one thread each: {spent}; {time.perf_counter() - began:.0f} s this time")
    for name in options.names:
        tell(EXPERIMENTS[name], options.out / f"{name}.json")
    return 0


def parser() -> Parser:
    commands = Parser(prog="python -m benchmarks.recipe", description="The recipe's claims in small.")
    add = commands.add_argument
    add("names", nargs="+", metavar="NAME", help=f"all, or of {', '.join(EXPERIMENTS)}")
    add("--quick", action="store_true", help="the machinery alone: one seed, a few steps, nothing to be learnt from it")
    add("--seeds", type=count, metavar="N", help="of each arm at most (default: the experiment's own, 5 or fewer)")
    add(
        "--jobs",
        type=count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs side by side, a thread each (default: one a core)",
    )
    add("--work", type=Path, default=Path("runs/recipe"), help="where runs are kept (default: runs/recipe)")
    add("--out", type=Path, help=f"where results go (default: {OUT}; with --quick: WORK/quick)")
    add("--draw", action="store_true", help="train nothing: figures and tables anew from OUT/NAME.json")
    return commands


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """With names, size and folders settled. Raises InputError."""
    check_packages()
    options.names = list(EXPERIMENTS) if "all" in options.names else list(dict.fromkeys(options.names))
    if unknown := [name for name in options.names if name not in EXPERIMENTS]:
        raise InputError(f"NAME {unknown[0]!r}: is no experiment; give all, or of {', '.join(EXPERIMENTS)}")
    options.size = QUICK if options.quick else FULL
    if options.seeds is not None:
        options.size = replace(options.size, seeds=options.seeds)
    options.out = options.out or (options.work / "quick" if options.quick else OUT)
    if options.draw and (missing := [name for name in options.names if not (options.out / f"{name}.json").exists()]):
        raise InputError(f"{options.out / missing[0]}.json: missing; run the experiment first, without --draw")
    return options


def result(experiment: Experiment, plan: Sequence[Run], size: Size, work: Path) -> dict[str, Any]:
    records = [record_of(each, work) for each in plan]
    seeds = {each.start.seed for each in plan}
    findings = experiment.find(records)
    return {
        "experiment": experiment.name,
        "question": experiment.question,
        "scale": f"{len(plan)} runs of {size.steps} steps × {size.groups} groups × {size.group_size}, up to {len(seeds)} seeds",
        "size": asdict(size),
        "seconds": seconds_of(records),
        "machine": provenance() | {"commit": ", ".join(dict.fromkeys(record["commit"] for record in records))},
        "configuration": config(plan[0], Path("WORK")),
        "changes": [{"labels": each.labels, "stages": list(each.stages), "context": each.context} for each in plan],
        "found": {"said": findings.said, "table": findings.table, "numbers": finite(findings.numbers)},
        "runs": records,
    }


def seconds_of(records: Sequence[Record]) -> dict[str, float]:
    """Of runs and warm-ups, each counted once."""
    runs = {record["key"]: record["seconds"] for record in records}
    starts = {record["start"]["key"]: record["start"]["seconds"] for record in records}
    return {"runs": round(sum(runs.values()), 1), "warm-ups": round(sum(starts.values()), 1)}


def finite(value: Any) -> Any:
    """With None for what JSON has no number for, as the interval of a single seed."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(experiment: Experiment, file: Path) -> None:
    """The figure, the table as Markdown, and both named on the terminal."""
    from benchmarks.recipe.figures import draw

    content = json.loads(file.read_text(encoding="utf-8"))
    findings = experiment.find(content["runs"])
    picture = draw(experiment, file)
    text = file.with_suffix(".md")
    replace_text(text, markdown(content, findings))
    Console(width=max(140, Console().width)).print(table(content, findings))
    for sentence in findings.said:
        print(f"  {sentence}")
    print(f"{file}, {text}, {picture}")


def markdown(content: dict[str, Any], findings: Findings) -> str:
    head, *rows = findings.table
    machine, seconds = content["machine"], content["seconds"]
    lines = [f"# {content['question']}", "", *(f"- {sentence}" for sentence in findings.said), ""]
    lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines.append(
        f"{content['scale']}; ±: 95 % of Student's t over seeds. {seconds['warm-ups']:,.0f} s of warm-ups and "
        f"{seconds['runs']:,.0f} s of runs (some shared with other experiments), each on one thread of {machine['cpu']}; "
        f"{machine['date']}, commit {machine['commit']}. `python -m benchmarks.recipe {content['experiment']}`"
    )
    return "\n".join(lines) + "\n"


def table(content: dict[str, Any], findings: Findings) -> Table:
    head, *rows = findings.table
    made = Table(title=content["question"], title_justify="left")
    for place, heading in enumerate(head):
        made.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


if __name__ == "__main__":
    run(main)
