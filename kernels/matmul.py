"""The loss head's three GEMMs with fp32 results: nothing is rounded to bf16 on its way out or on its way into a sum.

    logits = hidden · weight^T       d_hidden = d_logits · weight       d_weight += d_logits^T · hidden

On CUDA two bf16 or fp16 inputs go to the tensor cores as they are (`out_dtype`, torch ≥ 2.11 for all of these). On a CPU, whose
bf16 GEMM rounds its result, they are widened first, which is exact; the weight a tile of rows at a time, so that it is never in
fp32 as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 22
"""Elements of the weight that are widened at a time on a CPU: 16 MiB of fp32."""


def logits_into(out_RV: Tensor, hidden_RD: Tensor, weight_VD: Tensor) -> None:
    """out_RV [R, V] = hidden_RD [R, D] @ weight_VD [V, D]^T; out in fp32, or fp64 where an input is."""
    if _same(out_RV, hidden_RD, weight_VD):
        torch.mm(hidden_RD, weight_VD.T, out=out_RV)
    elif out_RV.is_cuda and hidden_RD.dtype == weight_VD.dtype:
        torch.ops.aten.mm.dtype_out(hidden_RD, weight_VD.T, out_RV.dtype, out=out_RV)
    else:
        wide_RD = hidden_RD.to(out_RV.dtype)
        for rows, tile in _tiles(weight_VD, out_RV.dtype):
            out_RV[:, rows] = wide_RD @ tile.T


def d_hidden_into(out_RD: Tensor, d_logits_RV: Tensor, weight_VD: Tensor) -> None:
    """out_RD [R, D] = d_logits_RV [R, V] @ weight_VD [V, D]; out in fp32, or fp64 where an input is."""
    if _same(out_RD, d_logits_RV, weight_VD):
        torch.mm(d_logits_RV, weight_VD, out=out_RD)
    elif out_RD.is_cuda and d_logits_RV.dtype == weight_VD.dtype:
        torch.ops.aten.mm.dtype_out(d_logits_RV, weight_VD, out_RD.dtype, out=out_RD)
    else:
        out_RD.zero_()
        for rows, tile in _tiles(weight_VD, out_RD.dtype):
            out_RD.addmm_(d_logits_RV[:, rows].to(out_RD.dtype), tile)


def add_d_weight(total_VD: Tensor, d_logits_RV: Tensor, hidden_RD: Tensor, *, first: bool) -> None:
    """total_VD [V, D] += d_logits_RV [R, V]^T @ hidden_RD [R, D], or = where `first`; total in fp32 (fp64 for fp64)."""
    beta = 0 if first else 1
    if total_VD.is_cuda and d_logits_RV.dtype == hidden_RD.dtype != total_VD.dtype:
        torch.ops.aten.addmm.dtype_out(total_VD, d_logits_RV.T, hidden_RD, total_VD.dtype, beta=beta, alpha=1, out=total_VD)
        return
    wide_RD = hidden_RD.to(total_VD.dtype)
    if d_logits_RV.dtype == total_VD.dtype:
        total_VD.addmm_(d_logits_RV.T, wide_RD, beta=beta)
        return
    for rows in _slices(len(total_VD), wide_RD.shape[1]):
        total_VD[rows].addmm_(d_logits_RV[:, rows].T.to(total_VD.dtype), wide_RD, beta=beta)


def _same(*tensors: Tensor) -> bool:
    return len({tensor.dtype for tensor in tensors}) == 1


def _slices(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _tiles(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    return ((rows, weight_VD[rows].to(dtype)) for rows in _slices(*weight_VD.shape))
