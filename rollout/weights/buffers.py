"""Memory that a trainer writes and engines on the same host read: anonymous, so nothing is left behind whoever dies.

A buffer is a memfd of this process. Others of the same user open it as /proc/<pid>/fd/<number>; when the last of them is gone, so
is the memory.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import Tensor

from rollout.errors import EngineError

ALIGNMENT = 64
"""Of each tensor within a buffer, bytes: what the checksum's streaming stores and a GPU's widest loads want."""


class SharedBuffer:
    """`nbytes` of shared memory, all of it there from the start: what is not to be had is an EngineError here, and no page is met
    for the first time in the middle of a push.

    bytes: uint8 [nbytes]. path: under which another process of this host opens it while this one lives.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._descriptor = os.memfd_create("keju-weights", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)
            self.bytes = _mapped(self._descriptor, nbytes)
        except (OSError, ValueError) as error:
            os.close(self._descriptor)
            raise EngineError(f"weights: no {nbytes >> 20} MiB of shared memory for a transfer buffer ({error})") from None
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def address(self, used: int) -> dict[str, Any]:  # noqa: ARG002 (all of it is mapped, once)
        """What a chunk says of its buffer."""
        return {"path": self.path, "bytes": self.nbytes}

    def flush(self) -> None:
        """What was written can be read."""

    def close(self) -> None:
        """Gives the name back; the memory goes with the last view of it, here or elsewhere."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_buffer(path: str, nbytes: int) -> Tensor:
    """uint8 [nbytes] over another process's buffer, read only by agreement. Raises OSError where it cannot be opened."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < nbytes:
            raise OSError(f"{path} holds {os.fstat(descriptor).st_size} bytes, not {nbytes}")
        return _mapped(descriptor, nbytes)
    finally:
        os.close(descriptor)


def aligned(offset: int) -> int:
    """The least multiple of ALIGNMENT that is not below it."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _mapped(descriptor: int, nbytes: int) -> Tensor:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # else each page's first touch is a trap into the kernel, slower than its copy
    return torch.frombuffer(mmap.mmap(descriptor, nbytes, flags=flags), dtype=torch.uint8)
