"""What a run shows while it goes on: a bar on a terminal, one line for each step elsewhere. On stderr, so that stdout stays the
report's."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """begin a step, advance by rows, end it. quiet: show nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bars: Bars | None = None
        self._task = None

    def begin(self, name: str, title: str, total: int | None) -> None:
        if self._quiet or not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._bars.start()
        self._task = self._bars.add_task(title or name, total=total)

    def advance(self, rows: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, rows)

    def end(self, title: str, entered: int, left: int, seconds: float, reused: bool) -> None:
        self.stop()
        if not self._quiet:
            took = "from an earlier run" if reused else f"{seconds:.1f} s"
            print(f"{title:<28} {entered:>11,} → {left:>11,}   {took}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away; also where a step ends by an exception."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
