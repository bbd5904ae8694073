"""GPU memory that a trainer writes and engines on the same host read: CUDA IPC, as `torch.multiprocessing` does it, but the
handle travels as JSON and nothing is pickled. Written against torch 2.13's reductions.py; not run on a GPU yet.

Order: the trainer waits for its stream before it tells an engine of a chunk; an engine waits for its device before it answers
(vLLM's `WeightTransferEngine.update_weights` does), and only then is the buffer written anew. No event is needed.

torch counts an export's readers: one export, one reader. Here every worker opens the same export once and keeps it, so the count
may fall below zero when they let go; that only means that the memory goes back to the allocator at once when the trainer drops
the buffer, which it does not do while a push is under way.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from rollout.errors import EngineError, InputError

HANDLE_FIELDS = ("device", "handle", "bytes", "offset", "counter_handle", "counter_offset", "event_handle", "event_sync")
"""What `UntypedStorage._share_cuda_` gives and `_new_shared_cuda` takes, in order."""


class CudaBuffer:
    """`nbytes` on `device`, exported once. bytes: uint8 [nbytes].

    Raises InputError where the allocator's expandable segments hold it, EngineError where there is no room.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        try:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise EngineError(f"weights: no {nbytes >> 20} MiB on {device} for a transfer buffer ({error})") from None
        _check_segment(self.bytes)
        self._handle = encoded(self.bytes.untyped_storage()._share_cuda_())

    def address(self, used: int) -> dict[str, Any]:  # noqa: ARG002 (all of it is mapped, once)
        """What a chunk says of its buffer."""
        return {"cuda": self._handle, "bytes": self.nbytes}

    def flush(self) -> None:
        """Waits for the stream that wrote."""
        torch.cuda.current_stream(self.bytes.device).synchronize()

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


def open_cuda_buffer(handle: dict[str, Any], nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes] over another process's buffer, as memory of `device`, which is this process's own number for it (the two
    processes may see different GPUs). Raises RuntimeError where the driver refuses."""
    torch.cuda.init()
    fields = decoded(handle)
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *fields[1:])
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


def encoded(fields: tuple[Any, ...]) -> dict[str, Any]:
    """`_share_cuda_`'s fields as JSON has them: bytes in base64."""
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in zip(HANDLE_FIELDS, fields, strict=True)
    }


def decoded(handle: dict[str, Any]) -> tuple[Any, ...]:
    """`encoded`, undone."""
    return tuple(
        base64.b64decode(handle[name], validate=True) if name.endswith("handle") else handle[name] for name in HANDLE_FIELDS
    )


def _check_segment(tensor: Tensor) -> None:
    """cudaIpcGetMemHandle takes what cudaMalloc gave, which an expandable segment's memory is not."""
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        start = segment["address"]
        if start <= address < start + segment["total_size"] and segment.get("is_expandable", False):
            raise InputError(
                "environment: PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) sets expandable_segments:True, from which no "
                "weights can be sent to an engine by CUDA IPC; unset it"
            )
