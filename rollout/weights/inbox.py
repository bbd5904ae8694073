"""An engine worker's end of a transfer: the bytes of a chunk, by whichever transport they come (`rollout.weights.transport`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from rollout.weights.broadcast import Group, Meeting
from rollout.weights.buffers import open_buffer
from rollout.weights.cuda_ipc import open_cuda_buffer

KEPT = 2
"""Buffers that stay open from push to push: as many as a trainer has. More would keep memory that the trainer gave back."""


class Inbox:
    """device: where this worker's model is. The memory that `receive` gives belongs to the trainer, or to the next chunk, as soon
    as this one is answered."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[Hashable, Tensor] = {}
        self._group: Group | None = None
        self._received = torch.empty(0, dtype=torch.uint8)

    def connect(self, meeting: Meeting, worker: int) -> None:
        """Leaves the broadcast's group of before and joins another, as number `worker` of this engine's workers; waits until all
        are there. Raises EngineError."""
        self.leave()
        self._group = Group(meeting, meeting.rank_offset + worker, self._device)

    def receive(self, buffer: dict[str, Any]) -> Tensor:
        """uint8: a chunk's "buffer". Raises ValueError where it is none, EngineError where a broadcast fails, OSError or
        RuntimeError where the trainer's memory cannot be opened."""
        nbytes = buffer["bytes"]
        if "path" in buffer:
            path = buffer["path"]
            # By inode: a path that was seen before may be another memory now.
            return self._kept((path, os.stat(path).st_ino), lambda: open_buffer(path, nbytes))
        if "cuda" in buffer:
            handle = buffer["cuda"]
            return self._kept(tuple(handle.values()), lambda: open_cuda_buffer(handle, nbytes, self._device))
        if "broadcast" in buffer:
            return self._broadcast(nbytes)
        raise ValueError(f"a chunk's buffer is none of path, cuda, broadcast: {sorted(buffer)}")

    def leave(self) -> None:
        """Leaves the broadcast's group, of which the update that failed was the last: who waits for this worker learns it."""
        if self._group is not None:
            self._group.close()
        self._group = None
        self._received = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Lets go of everything."""
        self._open.clear()
        self.leave()

    def _kept(self, key: Hashable, open_it: Callable[[], Tensor]) -> Tensor:
        if key not in self._open:
            while len(self._open) >= KEPT:
                del self._open[next(iter(self._open))]
            self._open[key] = open_it()
        return self._open[key]

    def _broadcast(self, nbytes: int) -> Tensor:
        if self._group is None:
            raise ValueError("a chunk comes by broadcast, but this worker was not connected to the broadcast's group")
        if self._received.numel() < nbytes:
            self._received = torch.empty(0, dtype=torch.uint8)  # before the larger one is made
            self._received = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        received = self._received[:nbytes]
        self._group.broadcast(received)
        return received
