"""Writes the report of a hang: asks every rank's process for its stack and state, and puts it in one file."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rollout import process
from trainer.hang_report import Health, Seen, inspect, report, sentence, with_stack
from trainer.metrics import replace_text

STACK_SECONDS = 4.0
"""For a rank to write its stack."""
STILL_SECONDS = 0.3
"""A stack that does not grow for so long is whole."""
TABLE_SECONDS = 3.0
"""For the board to tell what the ranks last said."""
PY_SPY_SECONDS = 15.0
GOODBYE_SECONDS = 4.0
"""For the other ranks of this host to end by themselves."""


def health_path(run: Path, rank: int) -> Path:
    return run / "health" / f"rank-{rank:05d}.json"


def stack_path(run: Path, rank: int) -> Path:
    return run / "health" / f"rank-{rank:05d}.stack"


def report_paths(run: Path) -> set[Path]:
    return set((run / "health").glob("report-*.txt"))


class ReportWriter:
    """own: of the rank that writes. stacks: its stack file. board: None where there is none."""

    def __init__(self, run: Path, own: Health, size: int, stacks: IO[bytes], board: Any) -> None:
        self._run, self._own, self._size, self._stacks, self._board = run, own, size, stacks, board
        self._healths = [own]

    def write(self, why: str) -> tuple[Path, str]:
        """(the report, its first line)."""
        self._healths = self._gathered()
        now = time.monotonic()
        ranks = self._with_stacks([inspect(health, self._own, now) for health in self._healths])
        when = datetime.datetime.now(datetime.UTC)
        path = self._run / "health" / f"report-{when:%Y%m%dT%H%M%SZ}.txt"
        replace_text(path, report(ranks, self._size, why, f"{when:%Y-%m-%d %H:%M:%S} UTC"))
        return path, sentence(ranks)

    def kill_the_rest(self) -> None:
        """The other ranks of this host end with the alarm; what cannot is killed, or torchrun would wait for it."""
        others = [each for each in self._healths if each.beside(self._own) and each.rank != self._own.rank]
        end = time.monotonic() + GOODBYE_SECONDS
        while others and time.monotonic() < end:
            others = [each for each in others if process.alive(each.pid, each.born)]
            for each in others:
                if process.state(each.pid) in ("T", "t"):
                    process.kill(each.pid, each.born)
            time.sleep(0.05)
        for each in others:
            process.kill(each.pid, each.born)

    def own_stack(self) -> str:
        """By faulthandler, from this thread: for a rank whose process the writer cannot signal."""
        return self._read_stack(self._own.rank, lambda: faulthandler.dump_traceback(file=self._stacks, all_threads=True))

    def _gathered(self) -> list[Health]:
        """What each rank said last: on the board, or where that does not answer, in the run folder."""
        end = time.monotonic() + TABLE_SECONDS
        found = {self._own.rank: self._own}
        for rank in range(self._size):
            if rank == self._own.rank:
                continue
            with contextlib.suppress(Exception):
                if self._board is not None and time.monotonic() < end and (text := self._board.get(f"health/{rank}")):
                    found[rank] = Health.from_json(text)
            with contextlib.suppress(OSError, ValueError, TypeError):
                if rank not in found:
                    health = Health.from_json(health_path(self._run, rank).read_text(encoding="utf-8"))
                    # Before the ranks have met, what a dead process left there may be of an earlier start.
                    if self._board is not None or (health.beside(self._own) and process.alive(health.pid, health.born)):
                        found[rank] = health
        return [found[rank] for rank in sorted(found)]

    def _with_stacks(self, ranks: list[Seen]) -> list[Seen]:
        return [with_stack(seen, self._stack_of(seen)) for seen in ranks]

    def _stack_of(self, seen: Seen) -> str:
        health = seen.health
        if health.end or seen.dead:
            return ""
        if not health.beside(self._own):
            return self._from_board(health.rank)
        if seen.frozen:
            return spied(health.pid)
        return self._read_stack(health.rank, lambda: os.kill(health.pid, signal.SIGUSR1)) or spied(health.pid)

    def _from_board(self, rank: int) -> str:
        end = time.monotonic() + STACK_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(Exception):
                if (text := self._board.get(f"stack/{rank}")) is not None:
                    return text
            time.sleep(0.1)
        return ""

    def _read_stack(self, rank: int, ask: Callable[[], object]) -> str:
        """What a rank appends to its stack file once it is asked."""
        path = stack_path(self._run, rank)
        try:
            before = size = path.stat().st_size
            ask()
            end, still = time.monotonic() + STACK_SECONDS, time.monotonic()
            while time.monotonic() < end:
                if (now := path.stat().st_size) != size:
                    size, still = now, time.monotonic()
                elif size > before and time.monotonic() - still > STILL_SECONDS:
                    break
                time.sleep(0.02)
            return path.read_bytes()[before:].decode("utf-8", "replace")
        except OSError:
            return ""


def spied(pid: int) -> str:
    """Through py-spy, where it is installed; "" otherwise."""
    if (spy := shutil.which("py-spy")) is None:
        return ""
    command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
