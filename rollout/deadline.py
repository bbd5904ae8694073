"""A wait that nothing can interrupt (a collective, a gather of shards) gets an end: past it the process says where it hangs, and
where the other ranks are, and exits with code 3. In a run the words go to whoever watches it, who writes the report
(`trainer.watch`).

    with Deadline(300, "rank 1: push of version 7", board) as deadline:
        deadline.at("gathering model.layers.3.mlp.up_proj.weight")      # starts the time anew
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

EXIT_HUNG = 3
POST_SECONDS = 1.0
"""Between two lines on the board."""
OTHERS_SECONDS = 5.0
"""For reading it."""


_reporter: Callable[[str], object] | None = None
_under_way: list[Deadline] = []


def report_to(reporter: Callable[[str], object] | None) -> None:
    """Whoever is told what hangs, in one line, and ends the process (exit code 3); where it returns, the process ends all the
    same. None: the line and the stacks go to stderr."""
    global _reporter
    _reporter = reporter


def under_way() -> list[str]:
    """What this process waits for under a deadline now; the innermost last."""
    return [deadline.text() for deadline in list(_under_way)]


class Board(Protocol):
    """Where ranks write what they are doing, for the others to read when one hangs."""

    def write(self, text: str) -> None: ...

    def read(self) -> list[str]:
        """Every rank's last line, in order."""
        ...


class Deadline:
    """A context manager. seconds: from the start, and from each `at`, to the next or the end. One wait at a time."""

    def __init__(self, seconds: float, call: str, board: Board | None = None) -> None:
        self._seconds, self._call, self._board = seconds, call, board
        self._where, self._since = "its start", time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Deadline:
        self.at("its start")
        _under_way.append(self)
        # Two threads: a board that does not answer must not keep the watch from its end.
        for task in (self._watch, self._post) if self._board is not None else (self._watch,):
            threading.Thread(target=task, name="keju-deadline", daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        _under_way.remove(self)
        self._over.set()

    def text(self) -> str:
        return f"{self._call}: {self._where}"

    def at(self, where: str) -> None:
        """Something was reached; what comes next may take as long again. Costs next to nothing: the board learns it later."""
        self._where, self._since = where, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._since > self._seconds:
                self._give_up()

    def _post(self) -> None:
        posted = None
        while True:
            if (where := self._where) != posted:
                with contextlib.suppress(Exception):  # whoever holds the board is gone; that is for others to say
                    self._board.write(self.text())
                posted = where
            if self._over.wait(min(POST_SECONDS, self._seconds / 4)):
                return

    def _give_up(self) -> None:
        try:
            line = f"{self.text()}: nothing for {self._seconds:g} s" + "".join(f"; {other}" for other in self._others())
            if _reporter is not None:
                _reporter(line)
            print(f"keju: error: {line}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        finally:
            os._exit(EXIT_HUNG)

    def _others(self) -> list[str]:
        """What the other ranks wrote last; nothing where that cannot be had at once."""
        if self._board is None:
            return []
        lines: list[str] = []

        def read() -> None:
            with contextlib.suppress(Exception):
                lines.extend(self._board.read())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(OTHERS_SECONDS)
        return [line for line in lines if not line.startswith(f"{self._call}:")]
