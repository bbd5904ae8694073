"""The console's phases as beats of this rank's pulse, on every rank: what a person sees on rank 0 is what the watch counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rollout.pulse import Pulse

OWN_UNITS = ("outputs",)
"""Units that ranks finish each at their own pace: signs of life that are not counted alike."""
NAMES = {"sequences": "micro-batch", "tensors": "tensor", "steps": "step", "files": "", "outputs": ""}
"""Unit of a phase → what one call of `advance` has finished."""


class BeatingConsole:
    """A console (`trainer.console`) whose phases also beat. From the thread of `pulse` alone."""

    def __init__(self, console: Any, pulse: Pulse) -> None:
        self._console, self._pulse = console, pulse

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[_Advance]:
        pulse = self._pulse
        outer = pulse.phase, pulse.unit, pulse.done
        pulse.phase, pulse.unit, pulse.done = name, NAMES.get(unit, unit), 0
        pulse.beat()
        try:
            with self._console.phase(name, total, unit) as bar:
                yield _Advance(bar, pulse, counted=unit not in OWN_UNITS)
        finally:
            pulse.phase, pulse.unit, pulse.done = outer
            pulse.stir()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)

    def __enter__(self) -> BeatingConsole:
        self._console.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._console.__exit__(*exception)


class _Advance:
    def __init__(self, bar: Any, pulse: Pulse, *, counted: bool) -> None:
        self._bar, self._pulse, self._counted = bar, pulse, counted

    def advance(self, n: int = 1, **facts: object) -> None:
        if self._counted:
            self._pulse.done += 1
            self._pulse.beat()
        else:
            self._pulse.stir()
        if n or facts:
            self._bar.advance(n, **facts)
