"""The floors, measured in the same rounds as the contenders: a copy of as many bytes, and the GEMMs by themselves.

Memory: the floor of a case is `cases.bytes_to_move` over the bandwidth of a copy (bytes read plus bytes written) of a buffer of
the logits' size. Arithmetic: the sum of the GEMMs that the mathematics needs, each by the library at its best: into its own
dtype, d_weight also into fp32, and on a CPU also from operands that were widened to fp32 beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.kernels.cases import GEMMS, Case, bytes_to_move
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.timing import Spread, Timed

COPY = "a copy of as many bytes"
MOST_COPIED = 8 << 30
"""Larger buffers copy no faster."""


def timed_floors(case: Case, inputs: Inputs) -> dict[str, Timed]:
    """What to time beside the contenders: the copy, or each way to do each GEMM. None for a case without a floor."""
    if case.takes_logits:
        return {COPY: Timed(_copy(inputs.logits_TV))}
    return {name: Timed(run) for name, run in _gemms(inputs).items()} if case.is_linear else {}


def copied_bytes(case: Case) -> int:
    """Read plus written by the copy."""
    return 2 * min(case.tokens * case.vocabulary * case.item_bytes, MOST_COPIED)


def bandwidth(case: Case, copy_ms: float) -> float:
    """Bytes a second of the copy."""
    return copied_bytes(case) / (copy_ms / 1000)


def floor_milliseconds(case: Case, measured: Mapping[str, Spread]) -> float | None:
    """The time that no kernel can beat by much; None where the case has no floor."""
    if COPY in measured:
        return 1000 * (bytes_to_move(case) or 0) / bandwidth(case, measured[COPY].median)
    best = best_gemms(measured)
    if not best:
        return None
    return best["logits"] if GEMMS[case.operation, case.mode] == 1 else sum(best.values())


def best_gemms(measured: Mapping[str, Spread]) -> dict[str, float]:
    """The fastest median of each of the three GEMMs, by name."""
    best: dict[str, float] = {}
    for name, spread in measured.items():
        if name.startswith("GEMM "):
            which = name.removeprefix("GEMM ").partition(",")[0]
            best[which] = min(best.get(which, spread.median), spread.median)
    return best


def _copy(logits_TV: Tensor) -> Callable[[], object]:
    source = logits_TV.reshape(-1)[: MOST_COPIED // logits_TV.element_size()]
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gemms(inputs: Inputs) -> dict[str, Callable[[], object]]:
    hidden, weight = inputs.hidden_TD, inputs.weight_VD
    tokens, vocabulary = len(hidden), len(weight)
    # Values like those of a gradient's: products of zeros or of one number run faster.
    d_logits = torch.empty(tokens, vocabulary, dtype=hidden.dtype, device=hidden.device).normal_(0, 1e-3)
    operands = {"logits": (hidden, weight.T), "d_hidden": (d_logits, weight), "d_weight": (d_logits.T, hidden)}
    found: dict[str, Callable[[], object]] = {}
    for name, (left, right) in operands.items():
        found[f"GEMM {name}, {_short(left)}"] = _into(left, right, left.dtype)
        if left.dtype == torch.float32:
            continue
        if left.is_cuda and name == "d_weight":
            found[f"GEMM {name}, {_short(left)} into fp32"] = _into(left, right, torch.float32)
        elif not left.is_cuda:
            found[f"GEMM {name}, widened to fp32"] = _into(left.float(), right.float(), torch.float32)
    return found


def _into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    if dtype == left.dtype:
        return lambda: torch.mm(left, right)
    return lambda: torch.mm(left, right, out_dtype=dtype)


def _short(tensor: Tensor) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[tensor.dtype]
