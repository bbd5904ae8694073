"""Kills at random instants, and what became of the run.

One life of a run: the command starts, and after a random time one of its processes, or all, get SIGKILL. An engine or a verifier
that dies is the run's to replace: it must go on. After any other death nothing of the run may be left within GONE_SECONDS, and
the same command must go on from where the folder is. A run that ends is compared with one that nothing stopped, and the next
begins, until all kills are done.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np

from benchmarks.soak.place import Place, rows_of, steps_of
from benchmarks.soak.processes import new_mark, processes_of, wait_until_gone
from trainer.checkpoint_folder import complete_checkpoint, folders_of, step_of
from trainer.metrics import LEDGER_FATES, number

GONE_SECONDS = 45.0
"""How long after a kill processes of the run may be left. torchrun gives a rank that waits in a collective 30 s."""
REPLACED = ("engine", "verifier")
"""Kinds of processes whose death the run survives by itself."""


@dataclass(slots=True)
class Kill:
    """kind: what was killed ("all": every process of the run). after: seconds from the command's start. step: steps that were
    finished then. gone: seconds until the rest had ended; None where the run went on."""

    kind: str
    after: float
    step: int
    gone: float | None = None
    fault: str = ""


@dataclass(slots=True)
class Outcome:
    """Of a series. faults: what broke a promise, in words; none is what is wanted."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    steps: int = 0
    """Finished in all runs, what was done again not counted."""
    prompts: int = 0
    """Drawn in all runs, by their ledgers."""
    repeated: int = 0
    """Steps that were done again after a kill."""
    lost: int = 0
    """Prompts that were drawn and have no fate in the ledger, or that the cursor passed without a draw."""
    mismatch: float = 0.0
    """Nats: the greatest of a step's mean difference between the sampler's log-probabilities and the trainer's."""
    unmatched: int = 0
    """Steps that have no such figure: all of the batch was recovered, from older weights."""
    faults: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return sum(not kill.fault for kill in self.kills)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tried": len(self.kills), "survived": self.survived}


class KillSeries:
    """kinds: of KINDS, or "rank 0", or "all"; each is hit equally often, in random order. span: a life's kill comes within so
    many seconds of its start, or of the last kill that the run survived. check: what is wrong with a finished run's folder.
    limit: seconds for one life. steps: finished before the first kill.
    """

    def __init__(
        self,
        place: Place,
        folder: Path,
        kinds: Sequence[str],
        kills: int,
        *,
        seed: int,
        span: float,
        check: Callable[[Path], list[str]],
        note: Callable[[str], None] = lambda _: None,
        limit: float = 1800.0,
        steps: int = 0,
    ) -> None:
        self._place, self._folder, self._kills, self._span = place, folder, kills, span
        self._check, self._note, self._limit, self._steps = check, note, limit, steps
        self._generator = np.random.default_rng(seed)
        self._order = shuffled(kinds, self._generator)
        self._missed: str | None = None
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run after run, until all kills are done and the last run is complete, or one cannot be completed."""
        whole = True
        while whole and (not self.outcome.runs or len(self.outcome.kills) < self._kills):
            run = self._folder / f"run-{self.outcome.runs}"
            while (ended := self._life(run)) is None:
                pass
            self.outcome.runs += 1
            self._judge(run, ended)
            whole = not ended
        return self.outcome

    def _judge(self, run: Path, ended: str) -> None:
        faults = [ended] if ended else self._check(run)
        self.outcome.faults += [f"{run.name}: {fault}" for fault in faults]
        if not ended:
            self.outcome.steps += steps_of(run)
            self.outcome.prompts += last_train(run)["ledger/drawn"]
            self.outcome.lost += lost_prompts(run)
            gaps = [number(row, "mismatch/mean") for row in rows_of(run) if row["kind"] == "train"]
            self.outcome.mismatch = max([self.outcome.mismatch, *(gap for gap in gaps if gap is not None)])
            self.outcome.unmatched += gaps.count(None)

    def _life(self, run: Path) -> str | None:
        """One start of the command, to its end or its death. None: it was killed; "": the run is complete; else what is wrong."""
        mark = new_mark()
        started = time.monotonic()
        process = self._place.start(run, mark)
        while not self.outcome.kills and steps_of(run) < self._steps and process.poll() is None:
            time.sleep(0.02)
        while len(self.outcome.kills) < self._kills:
            moment = time.monotonic() + float(self._generator.uniform(0, self._span))
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                break
            kind, self._missed = self._missed or next(self._order), None
            if not strike(kind, mark, self._generator):
                self._missed = kind  # no such process at this instant: at the next
                continue
            kill = Kill(kind, time.monotonic() - started, steps_of(run))
            self.outcome.kills.append(kill)
            self._note(f"kill {len(self.outcome.kills)} of {self._kills}: {kind} after {kill.after:.1f} s, at step {kill.step}")
            if kind.split()[0] not in REPLACED:
                self._await_death(run, mark, process, kill)
                return None
        return self._await_end(run, mark, process, started)

    def _await_death(self, run: Path, mark: str, process: Popen, kill: Kill) -> None:
        """Of everything that belongs to the run."""
        before = time.monotonic()
        left = wait_until_gone(mark, GONE_SECONDS)
        kill.gone = time.monotonic() - before
        if left:
            kill.fault = f"left after {GONE_SECONDS:g} s: {', '.join(each.name for each in left)}"
            self.outcome.faults.append(f"{run.name}: {kill.kind} killed: {kill.fault}")
            kill_all(mark)
        process.wait()
        self.outcome.repeated += steps_of(run) - step_of_newest(run)

    def _await_end(self, run: Path, mark: str, process: Popen, started: float) -> str:
        while process.poll() is None:
            if time.monotonic() - started > self._limit:
                kill_all(mark)
                process.wait()
                return f"not at its end after {self._limit:g} s; read {run.with_suffix('.log')}"
            time.sleep(0.1)
        if process.returncode:
            return f"exit code {process.returncode}; read {run.with_suffix('.log')}"
        if left := wait_until_gone(mark, GONE_SECONDS):
            return f"at its end, and these are left: {', '.join(each.name for each in left)}"
        return ""


def shuffled(kinds: Sequence[str], generator: np.random.Generator) -> Iterator[str]:
    """Each kind once, in random order, again and again."""
    while True:
        yield from (kinds[index] for index in generator.permutation(len(kinds)))


def strike(kind: str, mark: str, generator: np.random.Generator) -> bool:
    """SIGKILL to one process of the kind, or to all of the run. Whether there was one."""
    living = processes_of(mark)
    targets = [each.pid for each in living if kind in ("all", each.kind, each.name)]
    if kind != "all" and targets:
        targets = [int(generator.choice(targets))]
    hit = [pid for pid in targets if _kill(pid)]
    return bool(hit)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_all(mark: str) -> None:
    for each in processes_of(mark):
        _kill(each.pid)


def step_of_newest(run: Path) -> int:
    """Steps that the newest checkpoint's folder has behind it; 0 without one."""
    return max((step_of(folder) for folder in folders_of(run / "checkpoints")), default=0)


def last_train(run: Path) -> dict[str, Any]:
    return [row for row in rows_of(run) if row["kind"] == "train"][-1]


def lost_prompts(run: Path) -> int:
    """Of a finished run: prompts that its ledger or its cursors have lost."""
    state = json.loads((complete_checkpoint(run) / "state.json").read_text(encoding="utf-8"))
    drawn = sum(cursor["epoch"] * cursor["count"] + cursor["position"] for cursor in state["sources"].values())
    last = last_train(run)
    fates = sum(last[f"ledger/{fate}"] for fate in LEDGER_FATES)
    return abs(drawn - last["ledger/drawn"]) + abs(last["ledger/drawn"] - fates)


def same_as(whole: Path) -> Callable[[Path], list[str]]:
    """A check: every row, bit for bit, is that of the run that nothing stopped."""

    def check(run: Path) -> list[str]:
        got, wanted = rows_of(run), rows_of(whole)
        if got == wanted:
            return []
        if len(got) != len(wanted):
            return [f"{len(got)} rows of metrics, not {len(wanted)}"]
        row, other = next((a, b) for a, b in zip(got, wanted, strict=True) if a != b)
        names = sorted(name for name in row.keys() | other.keys() if row.get(name) != other.get(name))
        return [f"step {row['step']} differs in {', '.join(names)}"]

    return check


def consistent(steps: int, mismatch_bound: float) -> Callable[[Path], list[str]]:
    """A check where outputs depend on what is decoded beside: every step once, every prompt drawn has one fate, every row is of
    the version it says, and the sampler's log-probabilities are those of the weights that scored them (mismatch_bound: nats, of
    their mean difference over a step)."""

    def check(run: Path) -> list[str]:
        rows = [row for row in rows_of(run) if row["kind"] == "train"]
        faults = []
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            faults.append(f"steps {[row['step'] for row in rows]}")
        for row in rows:
            if row["ledger/drawn"] != sum(row[f"ledger/{fate}"] for fate in LEDGER_FATES):
                faults.append(f"step {row['step']}: the ledger does not add up")
            if row["weight_version"] != row["step"]:
                faults.append(f"step {row['step']}: weights of version {row['weight_version']}")
            gap = row.get("mismatch/mean", 0.0)
            if gap is None or gap > mismatch_bound:  # null: not finite
                faults.append(f"step {row['step']}: sampler and trainer differ by {gap} in the mean")
        return faults

    return check
