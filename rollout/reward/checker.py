"""A forked process that runs one scorer, under a clock that is held outside it.

SymPy spends minutes inside one C call on an answer like 9^{9^{9^9}}, where no signal handler and no other thread gets a turn; a
process can be killed. A spawned one is slow to replace, because it imports SymPy anew. So a worker imports once, never
calculates itself, and forks the process that does. The worker has one thread and neither CUDA nor locks, so its forks inherit
nothing that is held. What a fork may do is bounded (`rollout.reward.confine`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from rollout.process import die_with
from rollout.reward.confine import confine

START_SECONDS = 0.5
"""How long a forked process may take to begin, which on a busy machine is no part of the function's time."""

_BEGINS = b"begins"
_TICKS = os.sysconf("SC_CLK_TCK")


class LateError(Exception):
    """No result in time; the process was killed."""


class DiedError(Exception):
    """The process ended by itself; the message says how."""


class Checker:
    """Calls `function` in a forked process, one call after the other. What it returns must pickle; it must not raise."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._pid = 0

    def call(self, seconds: float, at_most: float, *args: Any, alone: bool = False) -> Any:
        """The function's result, within `seconds` of processor time and `at_most` seconds by the clock, both from its beginning:
        on a busy machine a short turn stays a turn. Raises LateError or DiedError, and then the next call has a new process.

        alone: in a process that no other call has, before or after, so that what happens in it stays in it."""
        if alone:
            with contextlib.closing(Checker(self._function)) as once:
                return once.call(seconds, at_most, *args)
        if not self._pid:
            self._fork()
        try:
            self._pipe.send(args)
            if self._pipe.poll(START_SECONDS) and self._pipe.recv() == _BEGINS and self._wait(seconds, at_most):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise DiedError(self._end()) from None
        self._end()
        raise LateError

    def _wait(self, seconds: float, at_most: float) -> bool:
        """Whether the result is there."""
        end, used = time.monotonic() + at_most, _processor_seconds(self._pid)
        while True:
            # A tick more: both figures are whole ones, rounded down.
            left = min(seconds - (_processor_seconds(self._pid) - used) + 1 / _TICKS, end - time.monotonic())
            if left <= 0:
                return self._pipe.poll(0)
            if self._pipe.poll(max(left, 0.01)):
                return True

    def close(self) -> None:
        if self._pid:
            self._end()

    def _fork(self) -> None:
        self._pipe, theirs = Pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                confine(theirs.fileno())
                die_with(parent)
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def _serve(self, pipe: Any) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                args = pipe.recv()
                pipe.send(_BEGINS)
                pipe.send(self._function(*args))

    def _end(self) -> str:
        """Kill it where it still lives, and its group; how it ended."""
        pid, self._pid = self._pid, 0
        self._pipe.close()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it was killed before it led one
            os.killpg(pid, signal.SIGKILL)
        return f"exit code {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"


def _processor_seconds(pid: int) -> float:
    """What the process has used so far; where the system does not tell, the clock."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / _TICKS
