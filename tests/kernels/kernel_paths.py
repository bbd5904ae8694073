"""Every way to compute the loss head's operations on this machine, and tensors brought to where it computes.

A test makes its problem on the CPU, with CPU generators, so that it is the same problem everywhere; `place` moves it without
changing its layout in memory, and `.cpu()` brings a result back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from kernels import backend, head

NATIVE = backend.has_native()
CAPABILITIES: list[str] = torch.ops.keju.cpu_capabilities() if NATIVE else []
CUDA = triton_interpreter.ON_GPU and hasattr(torch.ops.keju, "logprob_entropy_forward_cuda")


@dataclass(frozen=True, slots=True)
class Path:
    """One implementation on one device: `backend.use(backend)`, with the CPU's instruction set where there is a choice."""

    name: str
    backend: backend.Backend
    device: str
    capability: str | None = None

    @contextmanager
    def chosen(self) -> Iterator[Path]:
        if self.capability is not None:
            torch.ops.keju.set_cpu_capability(self.capability)
        try:
            with backend.use(self.backend):
                yield self
        finally:
            if self.capability is not None:
                torch.ops.keju.set_cpu_capability(CAPABILITIES[-1])

    def place(self, value: Any) -> Any:
        """A tensor's numbers on this path's device, without grad, with its strides, its offset and what lies around it; also the
        tensors of a tuple or a dataclass. Anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self.place(part) for part in value)
        if is_dataclass(value):
            return replace(value, **{field.name: self.place(getattr(value, field.name)) for field in fields(value)})
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if value.device.type == self.device:
            return value
        elements = value.untyped_storage().nbytes() // value.itemsize
        around = value.as_strided((elements,), (1,), 0).to(self.device)
        return around.as_strided(value.shape, value.stride(), value.storage_offset())


TRITON = Path("triton", "triton", triton_interpreter.DEVICE)
REFERENCE = Path("reference", "reference", "cpu")
PATHS = [
    TRITON,
    *(Path(name, "native", "cpu", name) for name in CAPABILITIES),
    REFERENCE,
    pytest.param(
        Path("cuda", "cuda", "cuda"),
        marks=pytest.mark.skipif(not CUDA, reason="csrc/cuda is not built or there is no GPU"),
    ),
]


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, path: Path, rows: int, vocabulary: int, itemsize: int = 4) -> None:
    """Has the loss head take its logits in chunks of at most `rows` rows."""
    columns = (vocabulary + 63) // 64 * 64 if path.backend == "triton" and itemsize == 4 else vocabulary
    monkeypatch.setitem(head.CHUNK_BYTES, path.device, rows * columns * itemsize)
