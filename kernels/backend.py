"""Which implementation the loss head runs with, said aloud where it is not the fast one."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Literal

LossPath = Literal["native", "reference"]


@functools.cache
def loss_path() -> LossPath:
    """ "native" where the compiled operations (csrc/, torch.ops.keju) can be loaded, else "reference": plain PyTorch, and
    NumPy for the rewards. The first call decides for the process, and warns once where the answer is "reference"."""
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
        return "reference"
    return "native"
