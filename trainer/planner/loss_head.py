"""What the loss head takes beside its results while it runs: `kernels.head.Head`, whose inside no dispatch mode sees.

    forward alone    the buffer of one chunk's logits, fp32 [R, V]
    with gradient    the buffer and d_weight's fp32 sum [V, D]; in bf16 the buffer is gone when that sum becomes the result

On a GPU a bf16 d_logits lies in the buffer and so does d_hidden; otherwise d_hidden of a chunk is a tensor of its own. On a CPU
bf16 inputs are widened: a chunk's hidden states, and the weight in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.head import chunk_rows, gradient_dtype, wide_dtype
from kernels.matmul import TILE_ELEMENTS


def workspace_bytes(hidden_TD: Tensor, weight_VD: Tensor, device_type: str, *, with_gradient: bool) -> int:
    """The most held at once beyond inputs and results, on "cuda" with Triton or on "cpu". Only shapes and dtypes are looked at;
    a few numbers per token are left out."""
    inputs = torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
    wide = wide_dtype(hidden_TD, weight_VD)
    (tokens, hidden), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    on_gpu, narrow = device_type == "cuda", inputs != wide
    columns = (vocabulary + 63) // 64 * 64 if on_gpu else vocabulary
    rows = min(chunk_rows(tokens, columns * wide.itemsize, device_type), tokens)
    buffer, chunk = rows * columns * wide.itemsize, rows * hidden * wide.itemsize
    tile = min(max(1, TILE_ELEMENTS // hidden), vocabulary) * hidden * wide.itemsize
    widened = chunk + max(2 * tile, tile + tile // hidden * rows) if narrow and not on_gpu else 0
    if not with_gradient:
        return buffer + widened
    d_hidden = 0 if on_gpu and inputs == torch.bfloat16 and hidden <= columns // 2 else chunk
    total = weight_VD.numel() * wide.itemsize
    dtype = gradient_dtype(weight_VD)
    if dtype == wide:
        return buffer + max(d_hidden, widened)  # the sum is the result
    return total + max(0, buffer + max(d_hidden, widened) - weight_VD.numel() * dtype.itemsize)
