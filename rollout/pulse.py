"""How far a rank is, for whoever watches it: a sequence number that all ranks count alike, and when it last moved.

A beat is one collective, one micro-batch, one tensor of a push, one phase begun: things that every rank does in the same order,
so the rank with the lowest number is the one that the others wait for. Beating writes attributes and nothing else; who reads them
is another thread (`trainer.watch`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Pulse:
    """One of a thread; only that thread writes, but for `stir`."""

    sequence: int = 0
    moved: float = field(default_factory=time.monotonic)
    """Of the last sign of life, on time.monotonic()."""
    step: int = 0
    """The one under way, from 1; 0 before the first."""
    phase: str = "start"
    unit: str = ""
    done: int = 0
    """So many units of the phase are finished."""
    waits: str = ""
    """The collective it is in."""
    held: int = 0
    """Bytes of host memory that the rank held when it last gave back what it did not use; 0 before."""

    def beat(self) -> None:
        self.sequence += 1
        self.moved = time.monotonic()

    def stir(self) -> None:
        """A sign of life that other ranks do not share: an output finished, a token decoded."""
        self.moved = time.monotonic()

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """A beat, and what it waits for until it has it."""
        self.beat()
        self.waits = collective
        try:
            yield
        finally:
            self.waits = ""
            self.stir()

    def silent(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self.moved

    def place(self) -> str:
        """Within the phase: "micro-batch 3"; "" where it has no parts."""
        return f"{self.unit} {self.done + 1}" if self.unit else ""
