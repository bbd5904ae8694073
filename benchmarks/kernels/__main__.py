"""python -m benchmarks.kernels [--quick | --full | --gate | --static | --tune]: see docs/kernels.md.

--full and --gate go together: the gates are then judged by the figures of the full run. Exit code 0 where all is well, 1 where a
gate is broken, 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernels import gates, report
from benchmarks.kernels.cases import Case, grid
from benchmarks.kernels.contender import Contender
from benchmarks.kernels.registry import contenders
from benchmarks.kernels.results import CaseResult
from benchmarks.kernels.suite import Effort, Suite
from rollout.errors import InputError
from trainer import cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = frozenset({"keju", "torch", "peer"})
LONG = 16_384
"""Cases of more tokens and a vocabulary come last, and in a gate with those alone who are judged."""
MINUTES = {"quick": 2.2, "full": 4.5}
SECONDS = {"cpu": {"quick": 1.5, "full": 6.0}, "cuda": {"quick": 0.5, "full": 1.5}}
"""Of timing for a case; every contender gets a few rounds at least, whatever that takes."""


@dataclass(frozen=True)
class Run:
    """One command: what is measured, on what, and where it is written."""

    device: torch.device
    effort: str
    contenders: Sequence[Contender]
    gates: Sequence[gates.Gate]
    out: Path | None
    machine: dict[str, object]
    command: str

    @property
    def file(self) -> Path | None:
        if self.out is None:
            return None
        name = report.slug(str(self.machine["device"]).partition(",")[0])
        return self.out / (f"kernels-{name}.json" if self.effort == "full" else f"kernels-{self.effort}-{name}.json")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.plot is not None:
        return _plot(options.plot)
    device = _device(options.device)
    if options.tune:
        from benchmarks.kernels.tune import tune

        return tune(device, options.out)
    everyone = contenders(device)
    effort = "full" if options.full else "quick" if options.quick or not (options.gate or options.static) else "gate"
    lines = [gate for gate in gates.read(options.gates, [one.name for one in everyone]) if options.only in gate.case.operation]
    run = Run(
        device=device,
        effort=effort,
        contenders=everyone,
        gates=_lines_for(lines, device, generous=options.generous) if options.gate else [],
        out=options.out or (RESULTS if options.full else None),
        machine=report.machine(device, options.commit),
        command="python -m benchmarks.kernels " + " ".join(arguments),
    )
    static = _static() if options.static or (options.gate and not options.only) else None
    if options.static and effort == "gate" and not options.gate:
        _write(run, [], [], static)
        return 0 if static is None or static.held else 1
    deadline = _deadline(run, options.minutes)
    results, suite = _measure(run, options.only, deadline)
    peers = frozenset(one.name for one in everyone if one.kind == "peer")

    def remeasure(gate: gates.Gate) -> CaseResult:
        return suite.measure(gate.case, _names([gate], peers))

    verdicts = gates.judge_all(run.gates, report.by_case(results), remeasure, lambda: time.monotonic() < deadline)
    if run.gates:
        print("\n".join(["", *report.gate_lines(verdicts)]))
    _write(run, results, verdicts, static)
    if effort == "full" and run.file is not None:
        _plot(run.file)
    broken = sum(verdict.state == "broken" for verdict in verdicts)
    if options.gate:
        print(f"{broken} of {len(verdicts)} gates broken")
    return 1 if broken or (static is not None and not static.held) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="The loss head's kernels, measured.")
    add = parser.add_argument
    add("--quick", action="store_true", help="small shapes (the default)")
    add("--full", action="store_true", help="the grid, most important cases first, until --minutes are up")
    add("--gate", action="store_true", help="check benchmarks/gates.toml; exit code 1 where a line is broken")
    add("--generous", action="store_true", help="with --gate: the limits for machines with noisy neighbours")
    add("--static", action="store_true", help="compile the Triton kernels for sm_90 and check the machine code; needs no GPU")
    add("--tune", action="store_true", help="time launch configurations of the row kernels; needs a GPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, metavar="DIR", help="where the JSON goes (default with --full: benchmarks/results)")
    add("--only", default="", metavar="NAME", help="operations whose name contains NAME")
    add("--minutes", type=float, help="no case is begun after that (default: quick 2.2, full 4.5, --gate alone has no end)")
    add("--gates", type=Path, default=ROOT / "benchmarks" / "gates.toml", metavar="FILE")
    add("--commit", default=os.environ.get("COMMIT"), help="what to record as the commit where there is no clone (or $COMMIT)")
    add("--plot", type=Path, metavar="FILE.json", help="only draw the picture of a run's JSON")
    return parser


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _lines_for(lines: Sequence[gates.Gate], device: torch.device, *, generous: bool) -> list[gates.Gate]:
    """The gates of the machine's class. Raises InputError where it has none: a gate that checks nothing is none."""
    kind = "cpu" if device.type == "cpu" else "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else None
    chosen = [gate.lenient() if generous else gate for gate in lines if gate.device == kind]
    if not chosen:
        raise InputError(f"--gate: gates.toml has no line for {report.device_name(device)}; run without --gate, or add some")
    return chosen


def _names(lines: Sequence[gates.Gate], peers: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*(gate.contenders(peers) for gate in lines)) if lines else frozenset()


def _deadline(run: Run, minutes: float | None) -> float:
    """On time.monotonic's clock."""
    limit = minutes if minutes is not None else MINUTES.get(run.effort, float("inf"))
    return time.monotonic() + 60 * limit


def _measure(run: Run, only: str, deadline: float) -> tuple[list[CaseResult], Suite]:
    """The gates' cases first, then the grid's, until the time is up."""
    peers = frozenset(one.name for one in run.contenders if one.kind == "peer")
    everybody: frozenset[str] = frozenset()
    judged = {
        gate.case: everybody
        if run.effort == "full" and not _is_long(gate.case)
        else _names([one for one in run.gates if one.case == gate.case], peers)
        for gate in run.gates
    }
    rest = [] if run.effort == "gate" else [case for case in grid(run.effort, run.device.type) if only in case.operation]
    wanted = _near_each_other(judged) | {case: everybody for case in rest if case not in judged}
    print(
        f"{run.machine['device']}, torch {run.machine['torch']}, triton {run.machine['triton']}, commit {run.machine['commit']}"
    )

    def show(results: list[CaseResult]) -> None:
        print(f"\n{report.case_table(results[-1])}", flush=True)
        _write(run, results, [], None)

    suite = Suite(run.device, run.contenders, _effort(run))
    return suite.run(wanted, deadline, show), suite


def _near_each_other(wanted: dict[Case, frozenset[str]]) -> dict[Case, frozenset[str]]:
    """Cases that share their inputs one after the other, so that these are made once; else the order stays, but that what takes
    longest, beyond 16K tokens, comes last."""
    order = {workload: place for place, workload in enumerate(dict.fromkeys(case.workload() for case in wanted))}
    return dict(sorted(wanted.items(), key=lambda item: (_is_long(item[0]), order[item[0].workload()])))


def _is_long(case: Case) -> bool:
    return case.vocabulary > 0 and case.tokens > LONG


def _effort(run: Run) -> Effort:
    seconds = SECONDS[run.device.type].get(run.effort, SECONDS[run.device.type]["full"])
    effort = Effort(seconds=seconds, memory=KINDS, compiling=45.0 if run.device.type == "cuda" else 300.0)
    if run.device.type == "cuda":
        return effort
    # On a CPU each figure of memory takes a process of its own.
    return replace(effort, memory=KINDS if run.effort == "full" else frozenset({"keju"}))


def _static():
    from benchmarks.kernels.static import check_all

    found = check_all(ROOT)
    print("\n".join(found.lines))
    return found


def _write(run: Run, results: Sequence[CaseResult], verdicts: Sequence[gates.Verdict], static) -> None:
    if run.file is not None:
        report.write(run.file, results, run.machine, run.command, verdicts, static.records if static is not None else ())


def _plot(file: Path) -> int:
    try:
        from benchmarks.kernels.plot import draw
    except ImportError as error:
        print(f"no picture: {error}")
        return 0
    print(draw(file))
    return 0


if __name__ == "__main__":
    cli.run(main)
