"""The ranks of a run as this floor sees them: who am I, and Python objects to and from rank 0.

Objects travel over a gloo group of their own (`torch.distributed`'s object collectives), never over the training group, so that
a slow rollout and a gradient never wait for each other's collective. One process alone needs no group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rollout.deadline import Board
from rollout.pulse import Pulse


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank in [0, size). group: a gloo group of all ranks, or None where size is 1. board: where ranks say what they are
    doing. pulse: counts the collectives of the thread that uses this."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    board: Board | None = None
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def first(self) -> bool:
        """Whether this rank holds the run's state and takes its decisions."""
        return self.rank == 0

    def another(self, timeout_seconds: float, pulse: Pulse | None = None) -> Ranks:
        """The same ranks over a group of their own, for a second thread with a pulse of its own; None: one that nobody watches,
        for a thread that has its own deadlines. A collective."""
        pulse = pulse or Pulse()
        if self.size == 1:
            return replace(self, pulse=pulse)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return replace(self, group=group, pulse=pulse)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; what the others pass is ignored."""
        with self.pulse.waiting("broadcast"):
            if self.size == 1:
                return value
            box = [value if self.first else None]
            dist.broadcast_object_list(box, src=0, group=self.group)
            return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value in order of rank, on rank 0; None elsewhere."""
        with self.pulse.waiting("gather"):
            if self.size == 1:
                return [value]
            values: list[Any] | None = [None] * self.size if self.first else None
            dist.gather_object(value, values, dst=0, group=self.group)
            return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value in order of rank, on every rank."""
        with self.pulse.waiting("all_gather"):
            if self.size == 1:
                return [value]
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
            return values
