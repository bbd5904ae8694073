"""The output head over chunks of rows: what `linear_logprob_entropy` and `linear_policy_loss` have in common.

One buffer holds a chunk's logits in fp32, then their gradient. Where Triton runs and both inputs are bf16, the gradient moves to
the upper half of each row (triton_rows.narrowed) and d_hidden is formed in the lower half, so a chunk costs its fp32 logits and
nothing else:

    row of the buffer   | columns × fp32 logits                                   |
    afterwards          | d_hidden, fp32          | columns × bf16 d_logits        |

d_weight is summed over chunks in fp32, whatever the weight is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.logprob_entropy import backend_of
from kernels.matmul import add_d_weight, d_hidden_into, logits_into

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 2_500_000_000}
"""Most bytes of logits held at once: 4096 rows of 152,064 fp32 logits on a GPU, which keeps its GEMMs wide and adds to d_weight
four times at 16K tokens; on a CPU a quarter of a gigabyte, 384 of those rows, for which a bf16 weight is widened once."""


class Head:
    """hidden_TD [T, D], weight_VD [V, D]: fp32, bf16, fp16 or fp64. d_weight_dtype: None where no gradient is wanted. kept: the
    `buffer` of another Head of the same, whose `logits` came to an end: what stands in it is not computed again."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, d_weight_dtype: torch.dtype | None = None, kept: Tensor | None = None
    ) -> None:
        if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
            shapes = f"{list(hidden_TD.shape)} and {list(weight_VD.shape)}"
            raise ValueError(f"hidden_TD, weight_VD: expected [T, D] and [V, D], got {shapes}")
        inputs = torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
        self.wide = wide_dtype(hidden_TD, weight_VD)
        self.d_hidden_TD = hidden_TD.new_empty(0) if d_weight_dtype is None else torch.empty_like(hidden_TD)
        if hidden_TD.is_cuda:
            hidden_TD, weight_VD = hidden_TD.to(inputs), weight_VD.to(inputs)
        self.hidden_TD, self.weight_VD = hidden_TD, weight_VD
        tokens = len(hidden_TD)
        shape = buffer_shape(hidden_TD, weight_VD)
        rows, self._columns = shape
        self.chunks = [slice(start, min(start + rows, tokens)) for start in range(0, tokens, max(1, rows))]
        backend = backend_of(hidden_TD.new_empty(0, dtype=self.wide))
        self.in_place = backend == "triton"
        if kept is not None:
            self.buffer = kept
        elif backend == "native":
            self.buffer = torch.ops.keju.empty_reused(shape, self.wide)
        else:
            self.buffer = hidden_TD.new_empty(shape, dtype=self.wide)
        self._kept, self._added = kept is not None, False
        self._d_weight_dtype = d_weight_dtype
        if d_weight_dtype is not None:
            make = weight_VD.new_zeros if tokens == 0 else weight_VD.new_empty
            self._d_weight_VD = make(weight_VD.shape, dtype=self.wide)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits [R, V] fp32) chunk by chunk, from the last where that was kept; a chunk's logits stand until the
        next is asked for."""
        last = self.chunks[-1:] if self._kept else []
        for rows in last + self.chunks[: len(self.chunks) - len(last)]:
            logits_RV = self.buffer[: rows.stop - rows.start, : len(self.weight_VD)]
            if rows not in last:
                logits_into(logits_RV, self.hidden_TD[rows], self.weight_VD)
            yield rows, logits_RV

    def gradient_memory(self, rows: slice) -> Tensor:
        """Where a chunk's d_logits [R, V] belong: over the logits, or narrowed to bf16 in the upper halves of their rows. Not to
        fp16, in which a token's share of a mean over 16K tokens is nothing."""
        from kernels.triton_rows import narrowed

        both_bf16 = self.hidden_TD.dtype == self.weight_VD.dtype == torch.bfloat16
        dtype = torch.bfloat16 if both_bf16 else self.wide
        return narrowed(self.buffer[: rows.stop - rows.start], len(self.weight_VD), dtype)

    def add(self, rows: slice, d_logits_RV: Tensor) -> None:
        """Takes a chunk's gradient into d_hidden and d_weight."""
        count, hidden = rows.stop - rows.start, self.hidden_TD.shape[1]
        add_d_weight(self._d_weight_VD, d_logits_RV, self.hidden_TD[rows], first=not self._added)
        self._added = True
        if d_logits_RV.dtype != self.wide and hidden <= self._columns // 2:
            d_hidden_RD = self.buffer[:count, :hidden]
        else:
            d_hidden_RD = self.buffer.new_empty(count, hidden)
        d_hidden_into(d_hidden_RD, d_logits_RV, self.weight_VD)
        self.d_hidden_TD[rows] = d_hidden_RD

    def d_weight(self) -> Tensor:
        """The sum, in the dtype that was asked for. The buffer is given up, so that both do not exist at once: the caller has let
        go of its chunks' logits and gradients."""
        del self.buffer
        return self._d_weight_VD.to(self._d_weight_dtype)


def buffer_shape(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[int, int]:
    """Rows and columns of the memory that holds a chunk's logits. Triton's rows are whole multiples of 64 columns."""
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    wide = wide_dtype(hidden_TD, weight_VD)
    columns = (vocabulary + 63) // 64 * 64 if backend_of(hidden_TD.new_empty(0, dtype=wide)) == "triton" else vocabulary
    return min(chunk_rows(tokens, columns * wide.itemsize, hidden_TD.device.type), tokens), columns


def chunk_rows(tokens: int, row_bytes: int, device_type: str) -> int:
    """Rows to a chunk: as few chunks as CHUNK_BYTES allows, equal ones, of whole tiles of 128 rows where there are that many."""
    most = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // row_bytes)
    if most >= 128:
        most = most // 128 * 128
    chunks = max(1, -(-tokens // most))
    rows = -(-tokens // chunks)
    return max(1, min(most, -(-rows // 128) * 128) if most >= 128 else rows)


def wide_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """In which values are computed and sums are kept: fp32, or fp64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)


def check_tokens(hidden_TD: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless each, by the name of its argument, holds one number a token: a kernel on a GPU would read on."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != hidden_TD.shape[:1]:
            raise ValueError(f"{name}: expected {list(hidden_TD.shape[:1])}, one a token, got {list(tensor.shape)}")


def gradient_dtype(weight_VD: Tensor) -> torch.dtype:
    """The dtype its gradient is to have: `weight.grad_dtype` (torch ≥ 2.10) where a leaf sets one, else its own; fp32 where a
    leaf sets None, which takes any.

    float32 spares the rounding of d_weight to bf16, and the memory of the rounded copy.
    """
    if torch.compiler.is_compiling() or not weight_VD.is_leaf:
        return weight_VD.dtype
    wanted = getattr(weight_VD, "grad_dtype", weight_VD.dtype)
    return torch.promote_types(weight_VD.dtype, torch.float32) if wanted is None else wanted
