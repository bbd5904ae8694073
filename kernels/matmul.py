"""GEMMs with fp32 results from low-precision inputs: the product is never rounded to bf16 on its way out."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N] → [M, N] in fp32 (fp64 where both are fp64), with fp32 accumulation.

    On CUDA two bf16 or fp16 inputs go to the tensor cores as they are (`out_dtype`, torch ≥ 2.8); on the CPU they are widened,
    which is exact, because its bf16 GEMM rounds the result.
    """
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(wide) @ right.to(wide)
