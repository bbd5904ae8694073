"""The console of a run: rich's live view on a terminal, plain lines in a log.

The trainer says what happens (`phase`, `step`, `evaluation`, `note`); each call swaps one frozen `State` for the next, and a
thread draws the newest one four times a second, so drawing costs the loop next to nothing. What is drawn stands in
`trainer.console_view`.
"""

import atexit
import errno
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TextIO

from rich.console import Console as Terminal
from rich.live import Live

from trainer.console_view import (
    ENTROPIES_SHOWN,
    NOTES_SHOWN,
    PACE_STEPS,
    Phase,
    State,
    evaluation_line,
    phase_line,
    render,
    step_line,
)
from trainer.metrics import number

REFRESHES_PER_SECOND = 4


class Console:
    """Shows one run. Close it (or use it in `with`); a forgotten close happens when the interpreter exits, Ctrl-C included.

    stage_of_step: (stage index, name, number of steps), in order; the numbers sum to total_steps.
    live: the live view or plain lines; None takes the live view where `stream` is a terminal. stream: stdout where None.
    finished: steps finished before this start, for a resumed run.
    heartbeat_seconds: in plain mode, a phase that lasts longer says where it is each time so many seconds have passed.
    """

    def __init__(
        self,
        total_steps: int,
        stage_of_step: list[tuple[int, str, int]],
        *,
        live: bool | None = None,
        stream: TextIO | None = None,
        finished: int = 0,
        heartbeat_seconds: float = 30.0,
    ):
        self._stream = sys.stdout if stream is None else stream
        started = time.monotonic()
        self._state = State(total_steps, tuple(stage_of_step), started=started, now=started, finished=finished)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._heartbeat_seconds = heartbeat_seconds
        self._live: Live | None = None
        if self._stream.isatty() if live is None else live:
            self._start_live()
        else:
            threading.Thread(target=self._heartbeat, name="keju-heartbeat", daemon=True).start()
        atexit.register(self.close)

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator["PhaseProgress"]:
        """A part of a step: sampling, rewarding, scoring, update, sync, checkpoint, evaluate. total: units in all, None where
        unknown.

        Phases nest: the inner one is shown until it ends.
        """
        outer = self._state.phase
        self._change(lambda state: replace(state, phase=Phase(name, total, unit, started=time.monotonic())))
        try:
            yield PhaseProgress(self)
        finally:
            self._change(lambda state: replace(state, phase=outer))

    def resumed(self, finished: int) -> None:
        """Say that the run continues after `finished` steps."""
        self._change(lambda state: replace(state, finished=finished))
        self.note(f"continuing after step {finished}")

    def step(self, row: dict) -> None:
        """Show a finished step's train row."""
        entropy, seconds = number(row, "entropy/mean"), number(row, "time/step")

        def after(state: State) -> State:
            return replace(
                state,
                row=row,
                finished=int(number(row, "step") or state.finished + 1),
                entropies=_appended(state.entropies, entropy, ENTROPIES_SHOWN),
                step_seconds=_appended(state.step_seconds, seconds, PACE_STEPS),
            )

        self._change(after)
        self._plain(step_line(self._state))

    def evaluation(self, row: dict) -> None:
        """Show an evaluation's row."""
        name = str(row.get("name", ""))
        self._change(lambda state: replace(state, evaluations={**state.evaluations, name: row}))
        self._plain(evaluation_line(row))

    def note(self, text: str) -> None:
        """Show one line that a person should see; the live view keeps the last few."""
        line = " ".join(text.split())
        self._change(lambda state: replace(state, notes=_appended(state.notes, line, NOTES_SHOWN)))
        self._plain(line)

    def alarms(self, lines: tuple[str, ...]) -> None:
        """Show these alarms while they last; a log has had a note when each began."""
        self._change(lambda state: replace(state, alarms=lines))

    def close(self) -> None:
        """Leave the last view standing and give the terminal back; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _start_live(self) -> None:
        terminal = Terminal(file=self._stream, force_terminal=True)
        self._live = Live(get_renderable=self._view, console=terminal, refresh_per_second=REFRESHES_PER_SECOND)
        self._live.start()
        # Live hides the cursor, which a SIGKILL or torchrun's SIGTERM would leave hidden: the one thing of the terminal that it
        # changes is taken back at once, so no way of dying needs a repair.
        terminal.show_cursor(True)

    def _view(self):
        return render(replace(self._state, now=time.monotonic()))

    def _change(self, after) -> None:
        with self._lock:  # phases may be advanced from several threads
            self._state = after(self._state)

    def _plain(self, line: str) -> None:
        if self._live is not None or self._closed.is_set():
            return
        try:
            print(line, file=self._stream, flush=True)
        except OSError as error:  # that must not end a run of days
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a file on a full disk takes the lines after it again
                self._closed.set()  # whoever read this went away (a pipe into head)

    def _heartbeat(self) -> None:
        # A thread, because the phase that most needs it is the one that no longer advances.
        said, last = None, 0.0
        while not self._closed.wait(min(1.0, self._heartbeat_seconds / 4)):
            phase, now = self._state.phase, time.monotonic()
            if phase is None:
                continue
            if said != phase.started:
                said, last = phase.started, phase.started
            if now - last > self._heartbeat_seconds:
                last = now
                self._plain(f"  {phase_line(phase, now)}")


class PhaseProgress:
    """The phase under way, as `Console.phase` gives it."""

    def __init__(self, console: Console):
        self._console = console

    def advance(self, n: int = 1, **facts: object) -> None:
        """n more units are done; facts are short values shown beside the bar, the newest of each name."""

        def after(state: State) -> State:
            if state.phase is None:
                return state
            phase = replace(state.phase, done=state.phase.done + n, facts={**state.phase.facts, **facts})
            return replace(state, phase=phase)

        self._console._change(after)


class NullConsole:
    """The same methods, showing nothing: for the ranks other than 0."""

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator["NullConsole"]:  # noqa: ARG002 — Console's signature
        yield self

    def advance(self, n: int = 1, **facts: object) -> None:
        pass

    def resumed(self, finished: int) -> None:
        pass

    def step(self, row: dict) -> None:
        pass

    def evaluation(self, row: dict) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def alarms(self, lines: tuple[str, ...]) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "NullConsole":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()


def _appended(values: tuple, value, keep: int) -> tuple:
    """values with `value` behind them, where it is not None; the last `keep` of them."""
    return values if value is None else (*values, value)[-keep:]
