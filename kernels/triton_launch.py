"""How a Triton kernel is launched, and how all of them are compiled for a GPU that is not there.

`compile_only` lets the launchers of triton_rows and triton_policy run as they are on meta tensors, and compiles what they would
have launched, with the same specialisation: what the machine code costs is known before a GPU has been seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_compiled: list[tuple[str, Any]] | None = None


def launch(kernel: Any, programs: int, *arguments: Any, device: torch.device, **options: Any) -> None:
    """Runs `programs` programs of a kernel on a device; nothing for none.

    `debug` keeps the kernels' own assertions (labels and temperatures in range), which cost one comparison a row and no
    synchronisation; `sanitize_overflow` is the debug mode's check of every integer, which is not wanted.
    """
    options |= {"debug": True, "sanitize_overflow": False}
    if _compiled is not None:
        _compiled.append((kernel.__name__, kernel.warmup(*arguments, grid=(max(1, programs),), **options)))
        return
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **options)


@contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
    """Inside, `launch` compiles for the target instead of launching; yields the list of (kernel name, compiled kernel).

    For meta tensors, whose address counts as aligned. Needs kernels that are not interpreted (no TRITON_INTERPRET).
    """
    global _compiled
    before, active = _compiled, driver._active
    driver.set_active(_AbsentGpu(target))
    _compiled = []
    try:
        yield _compiled
    finally:
        _compiled = before
        driver._active = active


class _AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return -1  # a key of its own in each kernel's cache

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def check_device(tensor: Tensor) -> None:
    """Raises ValueError where no kernel can run on the tensor's device."""
    if not (tensor.is_cuda or tensor.is_meta or is_interpreted()):
        raise ValueError(f"a Triton kernel needs a CUDA tensor, or TRITON_INTERPRET=1 for one on the {tensor.device.type}")
