"""Which processes belong to a run, and what each of them is.

A run is started with a mark in its environment, which whatever it starts inherits; so what outlives its parent is found too.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

MARK = "KEJU_SOAK_RUN"
"""Environment variable whose value is one run's own."""
KINDS = ("command", "torchrun", "rank", "engine", "verifier")
"""What can be killed. command: `python -m trainer.train CONFIG --ranks N`; verifier: a process that judges answers by rule."""


def new_mark() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Process:
    """kind: one of KINDS, or "helper": whatever else the run has started (resource trackers, an answer's checker)."""

    pid: int
    kind: str
    rank: int | None

    @property
    def name(self) -> str:
        return self.kind if self.rank is None else f"{self.kind} {self.rank}"


def processes_of(mark: str) -> list[Process]:
    """The living ones, by pid; zombies are dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = variables(folder)
            if environment.get(MARK) != mark or state(folder) in "ZX":
                continue
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended in between
        found.append((int(folder.name), parent, arguments, environment))
    ranks = {pid for pid, _, arguments, _ in found if kind_of(arguments) == "rank"}
    named = []
    for pid, parent, arguments, environment in found:
        kind = kind_of(arguments)
        if kind == "spawned":
            kind = "verifier" if parent in ranks else "helper"
        rank = int(environment["RANK"]) if kind in ("rank", "verifier") and "RANK" in environment else None
        named.append(Process(pid, kind, rank))
    return sorted(named, key=lambda each: each.pid)


def kind_of(arguments: list[str]) -> str:
    """By the command line; "spawned" is a process of Python's multiprocessing."""
    words = " ".join(arguments)
    if "torch.distributed.run" in arguments:
        return "torchrun"
    if "rollout.vllm.worker" in arguments:
        return "engine"
    if "trainer.train" in arguments:
        return "rank" if "--checked" in arguments else "command"
    return "spawned" if "multiprocessing.spawn" in words and "--multiprocessing-fork" in words else "helper"


def variables(folder: Path) -> dict[str, str]:
    """Of a process's folder in /proc: its environment as it was started."""
    pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def state(folder: Path) -> str:
    """One letter, as in proc(5)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]


def wait_until_gone(mark: str, seconds: float) -> list[Process]:
    """Those that are still alive after so long; none where all have ended."""
    end = time.monotonic() + seconds
    while left := processes_of(mark):
        if time.monotonic() > end:
            return left
        time.sleep(0.1)
    return []


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds. Bytes: its private pages and its share of those that it shares (PSS)."""

    bytes: int
    threads: int
    files: int


def footprint(pid: int) -> Footprint | None:
    """None where it ended in between."""
    folder = Path(f"/proc/{pid}")
    try:
        rollup = (folder / "smaps_rollup").read_text()
        pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return Footprint(1024 * pss, len(os.listdir(folder / "task")), len(os.listdir(folder / "fd")))
    except (OSError, StopIteration):
        return None


def shared_memory() -> int:
    """Files in /dev/shm, of all programs of this machine."""
    return len(os.listdir("/dev/shm"))
