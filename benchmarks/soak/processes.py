"""Which processes belong to a run, and what each of them is.

A run is started with a mark in its environment, which whatever it starts inherits; so what outlives its parent is found too.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

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
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended in between, or is another user's
            environment = process.environ()
            if environment.get(MARK) == mark and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append((process.pid, process.ppid(), kind_of(process.cmdline()), environment))
    ranks = {pid for pid, _, kind, _ in found if kind == "rank"}
    named = []
    for pid, parent, kind, environment in found:
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
    """What a process holds. Bytes: resident (RSS), which hangs on nothing else that runs."""

    bytes: int
    threads: int
    files: int


def footprint(pid: int) -> Footprint | None:
    """None where it ended in between."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return Footprint(process.memory_info().rss, process.num_threads(), process.num_fds())
    return None


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Names of the files in /dev/shm that these processes have mapped or open, those without a name any more too (with their
    inode, which tells them apart)."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended in between
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                *_, inode, name = line.split(maxsplit=5) if "/dev/shm/" in line else ("", "")
                found |= {f"{name} {inode}" if name.endswith("(deleted)") else name} if name else set()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if (name := os.readlink(descriptor)).startswith("/dev/shm/"):
                        found.add(f"{name} {descriptor.stat().st_ino}" if name.endswith("(deleted)") else name)
    return found


def files_of_shared_memory() -> set[str]:
    """All that have a name, of this machine."""
    return {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
