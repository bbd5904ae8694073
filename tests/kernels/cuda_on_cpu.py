"""Builds the kernels of csrc/cuda for a CPU (cuda_on_cpu.h, cuda_on_cpu.cpp) and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
GXX = shutil.which("g++")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def has_fma() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and " fma " in cpuinfo.read_text()


def build(directory: Path, flags: list[str]) -> Path:
    out = directory / "cuda_on_cpu.so"
    checked = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    plain = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-fno-strict-aliasing", f"-I{HERE}"]
    command = [GXX, *plain, *checked, *flags, "-o", str(out), str(HERE / "cuda_on_cpu.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return out


def arguments_of(logits_TV: Tensor, labels_T: Tensor, temperature: Tensor) -> tuple:
    rows, vocabulary = logits_TV.shape
    return (
        ctypes.c_int(TYPES[logits_TV.dtype]),
        ctypes.c_void_p(logits_TV.data_ptr()),
        *(ctypes.c_int64(number) for number in (rows, vocabulary, logits_TV.stride(0))),
        ctypes.c_void_p(labels_T.data_ptr()),
        ctypes.c_void_p(temperature.data_ptr()),
        ctypes.c_int64(0 if temperature.shape[0] == 1 else 1),
    )


def forward(library: ctypes.CDLL, logits_TV: Tensor, labels_T: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits_TV.shape[0]
    logprob_T, entropy_T, saved_3T = (torch.full(shape, 12345.0) for shape in ((rows,), (rows,), (3, rows)))
    out = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (logprob_T, entropy_T, saved_3T))
    assert library.forward(*arguments_of(logits_TV, labels_T, temperature), *out) == 0
    return logprob_T, entropy_T, saved_3T


def backward(
    library: ctypes.CDLL,
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
    d_logits_TV: Tensor,
) -> None:
    given_in = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (logprob_T, saved_3T, d_logprob_T, d_entropy_T))
    out = (ctypes.c_void_p(d_logits_TV.data_ptr()), ctypes.c_int64(d_logits_TV.stride(0)))
    assert library.backward(*arguments_of(logits_TV, labels_T, temperature), *given_in, *out) == 0
