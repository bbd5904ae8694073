"""Which implementation of an operation runs, decided in one place and said aloud where it is not the fast one.

triton     kernels/triton_*.py: CUDA tensors (and CPU tensors under TRITON_INTERPRET=1, for the tests)
cuda       csrc/cuda: CUDA C++, built where torch has CUDA and nvcc was found; taken only where it is asked for
native     csrc/cpu: CPU tensors
reference  the definition in plain PyTorch: float64 anywhere, and whatever the others cannot run
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Backend = Literal["triton", "cuda", "native", "reference"]

COMPILED = {"native": "logprob_entropy_forward", "cuda": "logprob_entropy_forward_cuda"}
"""Of csrc: backend → an operation that is there where it is built."""

_forced: Backend | None = None


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Forces one implementation for every operation in the block, in this process: for tests and benchmarks.

    float64 stays with the reference. Raises ValueError for a name that is none, RuntimeError for compiled operations that are not
    built.
    """
    global _forced
    if backend not in get_args(Backend):
        raise ValueError(f"backend: {backend!r} is none of {', '.join(get_args(Backend))}")
    if backend in COMPILED and not (has_native() and _has_operation(COMPILED[backend])):
        raise RuntimeError(
            f"backend {backend}: csrc is not built for it here; build it with: pip install --no-build-isolation --no-deps -e ."
        )
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose(device_type: str, dtype_name: str) -> Backend:
    """The implementation for tensors of a device type ("cpu", "cuda") and dtype ("float32", "bfloat16", …)."""
    if dtype_name not in ("float32", "bfloat16", "float16"):
        return "reference"
    if _forced is not None:
        return "reference" if _forced == "native" and dtype_name == "float16" else _forced
    if device_type == "cuda":
        return "triton" if has_triton() else "reference"
    return "native" if device_type == "cpu" and dtype_name != "float16" and has_native() else "reference"


def loss_path(device_type: str = "cpu") -> Backend:
    """What float32 and bfloat16 losses run with on a kind of device: the answer that a run's metrics record."""
    return choose(device_type, "float32")


@functools.cache
def has_native() -> bool:
    """Whether the compiled operations (csrc/, torch.ops.keju) can be loaded. The first call decides and warns if not."""
    try:
        importlib.import_module("torch")  # first: the extension finds torch's libraries only once torch has loaded them
        importlib.import_module("kernels._native")
    except ImportError as error:
        warnings.warn(
            f"kernels._native cannot be loaded ({error}): losses and rewards run on their slower PyTorch and NumPy definitions; "
            "build it with: pip install --no-build-isolation --no-deps -e .",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _has_operation(name: str) -> bool:
    return hasattr(importlib.import_module("torch").ops.keju, name)


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported. The first call decides and warns if not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"triton cannot be imported ({error}): losses on the GPU run on their slower PyTorch definitions; "
            "install it with: pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
