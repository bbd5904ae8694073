"""How a chunk's bytes get from the trainer to the engines. The trainer writes into a transport's buffers; what the chunk says of
its buffer (`rollout.weights.wire`) tells an engine's `rollout.weights.inbox` where to find them.

| transport          | engines                        | "buffer" of a chunk                                           |
|--------------------|--------------------------------|---------------------------------------------------------------|
| `SharedMemory`     | on this host, without a GPU    | {"path": "/proc/41/fd/9", "bytes": size of the buffer}        |
| `CudaIpc`          | on this host's GPUs            | {"cuda": {handle and its fields}, "bytes": size of the buffer} |
| `broadcast.Broadcast` | anywhere                    | {"broadcast": number of the buffer, "bytes": those in use}    |
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rollout.weights.buffers import SharedBuffer
from rollout.weights.cuda_ipc import CudaBuffer


class Buffer(Protocol):
    """bytes: uint8 [nbytes], which the trainer writes."""

    nbytes: int
    bytes: Tensor

    def address(self, used: int) -> dict[str, Any]:
        """The chunk's "buffer", of which the first `used` bytes count."""
        ...

    def flush(self) -> None:
        """Waits until what was written can be read by others."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """One at the trainer's end, kept from push to push."""

    def buffer(self, nbytes: int) -> Buffer:
        """Raises EngineError where there is no room."""
        ...

    def meet(self, lanes: Any) -> None:
        """Once in a push, behind each engine's `begin` (`rollout.weights.push.Lanes`): whatever must be agreed on beforehand."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    """Buffers that engines on this host map into their own memory."""

    def buffer(self, nbytes: int) -> SharedBuffer:
        return SharedBuffer(nbytes)

    def meet(self, lanes: Any) -> None: ...

    def close(self) -> None: ...


class CudaIpc:
    """Buffers on a GPU that engines on this host map into their own address space, each on the device where its model is: the
    same GPU, or one that reaches it (peer access). Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffer(self, nbytes: int) -> CudaBuffer:
        return CudaBuffer(nbytes, self._device)

    def meet(self, lanes: Any) -> None: ...

    def close(self) -> None: ...
