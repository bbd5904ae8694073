"""`python -m benchmarks.soak kills|memory`: whether a run of weeks would live, in minutes.

    kills    SIGKILL of any process of a run at random instants, again and again; then the same command again. At the end every
             run must be, bit for bit, the run that nothing stopped (--engine vllm, whose outputs depend on what is decoded
             beside: the ledger adds up and no step is trained on unknown weights)
    memory   one long run; memory, threads and files of each of its processes; a picture beside the JSON

Both run configs/demo.yaml on two ranks, its model warmed up once in --place (kept there for the next time).
"""

from __future__ import annotations

import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.soak.kills import KillSeries, Outcome, consistent, same_as
from benchmarks.soak.memory import MAX_GROWTH, SETTLED, Series, watch
from benchmarks.soak.place import Place, demo_place
from benchmarks.soak.processes import new_mark
from rollout.cli import Parser
from trainer import cli
from trainer.config_file import load_config
from trainer.environment import provenance

OFTEN = "checkpoint.every=2"
"""Else a life of some seconds would never reach the next checkpoint."""
RECIPE = "checkpoint.every=10"
CONTEXT = 120
"""Of all three stages: a longer one takes more memory, which is no growth."""
KINDS = ("rank 0", "rank 1", "verifier", "torchrun", "command", "all")
SPAN = {"transformers": 40.0, "vllm": 90.0}
MISMATCH_BOUND = 1e-5
"""Nats, of the mean over a step's tokens, fp32 on both sides. That it tells the weights of the step before:
tests/e2e/test_kill_anywhere.py. A single token does not: where its probability is small, rounding alone may show more."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.soak", description="Kills at random instants, or a long run's memory.")
    parser.add_argument("what", choices=("kills", "memory"))
    parser.add_argument("--engine", choices=SPAN, default="transformers")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300, help="memory: of the run, a third of them in each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, default=Path("runs/soak"), help="folder of the model and the runs (runs/soak)")
    parser.add_argument("--read", type=Path, help="memory: no run, the figures of this earlier --out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.read is not None:
        series = Series.of(json.loads(options.read.read_text(encoding="utf-8")))
        Console().print(memory_table(series))
        return tell(series.faults())
    often = [OFTEN] if options.what == "kills" else [RECIPE]
    place = demo_place(options.place.resolve(), [*often, f"engine.kind={options.engine}"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{options.what}-", dir=options.place) as folder:
        record, faults = (kills if options.what == "kills" else memory)(options, place, Path(folder).resolve())
    record |= {"engine": options.engine, "seconds": time.perf_counter() - start, "machine": provenance()}
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if options.what == "memory":
            from benchmarks.soak.plot import draw

            print(draw(options.out))
    return tell(faults)


def tell(faults: list[str]) -> int:
    for fault in faults:
        print(f"soak: FAILED: {fault}")
    return 1 if faults else 0


def kills(options: Namespace, place: Place, folder: Path) -> tuple[dict, list[str]]:
    kinds = KINDS if options.engine == "transformers" else (*KINDS, "engine")
    if options.engine == "transformers":
        print("soak: the run that nothing stops", flush=True)
        place.finish(folder / "whole", new_mark())
        check = same_as(folder / "whole")
    else:
        config = load_config(place.config, place.overrides)
        check = consistent(config.total_steps, MISMATCH_BOUND)
    note = lambda text: print(f"soak: {text}", flush=True)  # noqa: E731
    span = SPAN[options.engine]
    outcome = KillSeries(place, folder, kinds, options.kills, seed=options.seed, span=span, check=check, note=note).run()
    Console().print(kills_table(outcome))
    return outcome.as_dict() | {"seed": options.seed, "span_seconds": span}, outcome.faults


def kills_table(outcome: Outcome) -> Table:
    title = (
        f"{outcome.survived} of {len(outcome.kills)} kills survived\n{outcome.runs} runs, {outcome.steps} steps, "
        f"{outcome.repeated} done again; prompts lost: {outcome.lost} of {outcome.prompts}\n"
        f"sampler and trainer differ by {outcome.mismatch:.2g} nats at most in a step's mean ({outcome.unmatched} steps without)"
    )
    shown = Table("killed", "times", "survived", "gone after (s), at most", title=title)
    for kind in sorted({kill.kind for kill in outcome.kills}):
        of_kind = [kill for kill in outcome.kills if kill.kind == kind]
        gone = [kill.gone for kill in of_kind if kill.gone is not None]
        survived = sum(not kill.fault for kill in of_kind)
        shown.add_row(kind, str(len(of_kind)), str(survived), f"{max(gone):.1f}" if gone else "the run goes on")
    return shown


def memory(options: Namespace, place: Place, folder: Path) -> tuple[dict, list[str]]:
    third = -(-options.steps // 3)
    steps = [f"stages[{index}].{key}" for index in range(3) for key in (f"steps={third}", f"context={CONTEXT}")]
    series = watch(place, folder / "run", steps, note=lambda text: print(f"soak: {text}", flush=True))
    Console().print(memory_table(series))
    return series.as_dict(), series.faults()


def memory_table(series: Series) -> Table:
    shown = Table(
        "process", "MiB at the end", f"growth after step {SETTLED}", "of the medians",
        title=f"{series.steps} steps; growth at most {MAX_GROWTH:.0%}",
    )  # fmt: skip
    medians = series.median_growth()
    for name, growth in series.growth().items():
        shown.add_row(name, f"{series.mib[name][-1]:.0f}", f"{growth:+.2%}", f"{medians[name]:+.2%}")
    return shown


if __name__ == "__main__":
    cli.run(main)
