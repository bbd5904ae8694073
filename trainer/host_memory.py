"""Host memory: that a GPU copies to and from at full speed, and that which nobody uses any more."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
from pathlib import Path

import torch
from torch import Tensor

SLAB = 1 << 30
"""Bytes. torch rounds each pinned allocation up to a power of two: tensors are cut from slabs that are one."""
ALIGNMENT = 64


class HostMemory:
    """Zeros on the host; pinned ones side by side in slabs."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slab = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self._pinned:
            return torch.zeros(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        room = -(-size // ALIGNMENT) * ALIGNMENT
        if room > len(self._slab):
            self._slab = torch.zeros(max(SLAB, room), dtype=torch.uint8, pin_memory=True)
        taken, self._slab = self._slab[:size], self._slab[room:]
        return taken.view(dtype).view(shape)


def held() -> int:
    """Bytes that this process holds once it has given back what it does not use: resident, shared pages too. 0 where the system
    does not say (elsewhere than on Linux)."""
    give_back()
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return 0


def give_back() -> None:
    """What this process has freed goes back to the system, where glibc keeps it between blocks that are still used: a heap that
    batches of all lengths have gone through grows for thousands of steps otherwise. Milliseconds; nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
