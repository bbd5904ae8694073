"""Log-probability and entropy straight from hidden states and the output weight, never holding all logits.

    logits_TV = hidden_TD @ weight_VD^T      in chunks of rows, fp32, each dropped as soon as it has been reduced

Forward alone is 1 GEMM. With gradient the chunk's logits are computed again in backward (4 GEMMs in all): the gradient that comes
in is not known before. Where it is known, `linear_policy_loss` needs 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.logprob_entropy import logprob_entropy_backward_, logprob_entropy_forward
from kernels.matmul import matmul_fp32

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Most logits held at once: 32 MiB of fp32 stay near a CPU's cache, 2 GiB keep a GPU's GEMM wide."""


def row_chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose logits stay under CHUNK_ELEMENTS; none for no rows."""
    step = max(1, CHUNK_ELEMENTS.get(device.type, 1 << 23) // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def linear_logprob_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.logprob_entropy` of hidden_TD @ weight_VD^T; differentiable by hidden_TD and weight_VD.

    hidden_TD [T, D], weight_VD [V, D]: fp32, bf16 or fp64. labels_T [T] int64, IGNORE allowed. temperature: scalar or [T].
    Returns (logprob_T, entropy_T), fp32 (fp64 for fp64), nats. d_weight is summed over chunks in fp32.
    """
    return _LinearLogprobEntropy.apply(hidden_TD, weight_VD, labels_T, temperature)


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, temperature):
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        logprob_T = hidden_TD.new_empty(len(labels_T), dtype=wide)
        entropy_T = torch.empty_like(logprob_T)
        for rows in row_chunks(len(labels_T), len(weight_VD), hidden_TD.device):
            logits = matmul_fp32(hidden_TD[rows], weight_VD.T)
            logprob_T[rows], entropy_T[rows], *_ = logprob_entropy_forward(logits, labels_T[rows], rows_of(temperature, rows))
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
        ctx.temperature = temperature
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx, d_logprob_T, d_entropy_T):
        hidden_TD, weight_VD, labels_T = ctx.saved_tensors
        gradient = HeadGradient(hidden_TD, weight_VD)
        for rows in row_chunks(len(labels_T), len(weight_VD), hidden_TD.device):
            logits = matmul_fp32(hidden_TD[rows], weight_VD.T)
            forward = logprob_entropy_forward(logits, labels_T[rows], rows_of(ctx.temperature, rows))
            gradient.add(rows, logits, labels_T, ctx.temperature, forward, d_logprob_T[rows], d_entropy_T[rows])
        return gradient.d_hidden_TD, gradient.d_weight(), None, None


class HeadGradient:
    """Collects d_hidden and d_weight chunk by chunk; d_weight in fp32 whatever the weight is."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor) -> None:
        self._hidden_TD, self._weight_VD = hidden_TD, weight_VD
        self.d_hidden_TD = torch.empty_like(hidden_TD)
        self._d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))

    def add(
        self,
        rows: slice,
        logits: Tensor,
        labels_T: Tensor,
        temperature: float | Tensor,
        forward: tuple[Tensor, Tensor, Tensor],
        d_logprob: Tensor,
        d_entropy: Tensor,
    ) -> None:
        """One chunk; overwrites `logits` with their gradient. forward: what `logprob_entropy_forward` gave for it."""
        logprob, _, saved = forward
        d_logits = logprob_entropy_backward_(
            logits, labels_T[rows], rows_of(temperature, rows), logprob, saved, d_logprob, d_entropy
        )
        d_logits = d_logits.to(self._weight_VD.dtype)
        self.d_hidden_TD[rows] = matmul_fp32(d_logits, self._weight_VD).to(self.d_hidden_TD.dtype)
        self._d_weight_VD += matmul_fp32(d_logits.T, self._hidden_TD[rows])

    def d_weight(self) -> Tensor:
        return self._d_weight_VD.to(self._weight_VD.dtype)


def rows_of(temperature: float | Tensor, rows: slice) -> float | Tensor:
    """The temperature of a chunk: a scalar for all, or its rows."""
    return temperature[rows] if isinstance(temperature, Tensor) and temperature.numel() > 1 else temperature
