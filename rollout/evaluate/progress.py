"""What an evaluation shows while it goes on, on stderr: a bar with tokens per second and the time left on a terminal, a line now
and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0


class Show:
    """A context manager. quiet: notes alone. Its methods may be called from any thread."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bars: Progress | None = None
        self._lock = threading.Lock()
        self._title = ""

    def __enter__(self) -> Show:
        if not self._quiet and self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), console=self._console,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, title: str, kept: int, total: int, what: str = "sample") -> None:
        """A benchmark of `total` outputs, `kept` of which are there already; what is to be done with the rest."""
        self._title, self._done, self._new, self._total, self._tokens = title, kept, 0, total, 0
        self._start = self._said = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(title, total=total, completed=kept, rate="")
        elif not self._quiet:
            self._line(f"{title}: {total - kept:,} of {total:,} outputs to {what}")

    def sampled(self, outputs: int, tokens: int) -> None:  # noqa: ARG002 - `rollout.engine.Progress`; outputs count once kept
        """More tokens are sampled."""
        with self._lock:
            self._tokens += tokens
        self._refresh()

    def finished(self, outputs: int) -> None:
        """More outputs are on disk."""
        with self._lock:
            self._done, self._new = self._done + outputs, self._new + outputs
        self._refresh()

    def note(self, text: str) -> None:
        """One line that a person should see."""
        self._line(" ".join(text.split()))

    def _refresh(self) -> None:
        seconds = time.monotonic() - self._start
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if seconds > 0 and self._tokens else ""
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, rate=rate)
        elif not self._quiet and (self._done == self._total or time.monotonic() - self._said > LINE_SECONDS):
            self._said = time.monotonic()
            left = f", {seconds / self._new * (self._total - self._done):,.0f} s left" if 0 < self._new < self._total else ""
            self._line(f"{self._title}: {self._done:,} of {self._total:,} outputs, {rate}{left}")

    def _line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
