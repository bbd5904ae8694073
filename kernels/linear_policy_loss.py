"""The whole loss head in one pass over the vocabulary: loss, statistics, d_hidden and d_weight with 3 GEMMs.

    loss = sum_t weight_t · (clipped policy loss_t + kl_coefficient · k3_t)  +  entropy_weight · sum_t H_t

The gradient of the clipped loss by a token's logits depends on that token's own log-probability alone, so a chunk's d_logits are
formed as soon as its logits exist and the logits need not be computed twice. `entropy_weight` carries Targeted Entropy
Regularization: coefficient · sign(mean entropy - target) / tokens of the mini-batch on all ranks. The sign is the one global
quantity; the caller assumes it from the scoring pass, gets the true entropies back and repeats the pass where it assumed wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_logprob_entropy import HeadGradient, row_chunks, rows_of
from kernels.logprob_entropy import logprob_entropy_forward
from kernels.matmul import matmul_fp32


@dataclass(frozen=True, slots=True)
class PolicyLossInputs:
    """Per-token inputs, all [T], fp32 (fp64 for exact tests), and the scalars of the loss.

    What they mean: `reference.clipped_policy_loss`.
    """

    labels_T: Tensor
    old_logprob_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    clip_low: float
    clip_high: float
    entropy_weight: float = 0.0
    """Factor of the sum of entropies over the tokens with weight ≠ 0."""
    ref_logprob_T: Tensor | None = None
    kl_coefficient: float = 0.0
    temperature: float | Tensor = 1.0


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss: scalar, differentiable by hidden and weight. The rest is detached: sums over the tokens with weight ≠ 0."""

    loss: Tensor
    policy_loss: Tensor
    """The clipped part with its KL term, without entropy."""
    logprob_T: Tensor
    entropy_T: Tensor
    entropy_sum: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_sum: Tensor
    """Sum of k3 for KL(old ‖ new)."""
    ref_kl_sum: Tensor
    """Sum of k3 for KL(new ‖ reference); 0 without a reference."""
    ratio_max: Tensor
    ratio_min: Tensor


def linear_policy_loss(hidden_TD: Tensor, weight_VD: Tensor, inputs: PolicyLossInputs) -> PolicyLoss:
    """hidden_TD [T, D], weight_VD [V, D]: fp32, bf16 or fp64; never holds [T, V]. d_weight is summed in fp32.

    Gradients are formed in the forward where grad mode is on and scaled by the incoming gradient in the backward.
    """
    return PolicyLoss(*_LinearPolicyLoss.apply(hidden_TD, weight_VD, inputs, torch.is_grad_enabled()))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, inputs: PolicyLossInputs, grad_enabled: bool):
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with_gradient = grad_enabled and any(ctx.needs_input_grad[:2])
        gradient = HeadGradient(hidden_TD, weight_VD) if with_gradient else None
        logprob_T = hidden_TD.new_zeros(len(inputs.labels_T), dtype=wide)
        entropy_T = torch.zeros_like(logprob_T)
        chunks = [_chunk_loss(rows, hidden_TD, weight_VD, inputs, logprob_T, entropy_T, gradient)
                  for rows in row_chunks(len(inputs.labels_T), len(weight_VD), hidden_TD.device)]  # fmt: skip
        sums = _add_up(chunks, hidden_TD.device, wide)
        entropy_sum = torch.where(inputs.weight_T != 0, entropy_T, 0).sum()
        ref_kl_sum = torch.zeros_like(entropy_sum)
        if inputs.ref_logprob_T is not None:
            gap_T = inputs.ref_logprob_T.to(wide) - logprob_T
            ref_kl_sum = torch.where(inputs.weight_T != 0, reference.k3(gap_T), 0).sum()
        loss = sums.loss + inputs.entropy_weight * entropy_sum
        outputs = (loss, sums.loss.clone(), logprob_T, entropy_T, entropy_sum, sums.clipped_low, sums.clipped_high,
                   sums.kl_sum, ref_kl_sum, sums.ratio_max, sums.ratio_min)  # fmt: skip
        ctx.mark_non_differentiable(*outputs[1:])
        if gradient is not None:
            ctx.save_for_backward(gradient.d_hidden_TD, gradient.d_weight())
        return outputs

    @staticmethod
    def backward(ctx, d_loss, *_):
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        return d_hidden_TD * d_loss.to(d_hidden_TD.dtype), d_weight_VD * d_loss.to(d_weight_VD.dtype), None, None


def _chunk_loss(rows, hidden_TD, weight_VD, inputs, logprob_T, entropy_T, gradient) -> reference.ClippedPolicyLoss:
    """One chunk of rows: fills its part of logprob_T and entropy_T, adds its gradient, gives its sums."""
    labels = torch.where(inputs.weight_T != 0, inputs.labels_T, reference.IGNORE)
    logits = matmul_fp32(hidden_TD[rows], weight_VD.T)
    forward = logprob_entropy_forward(logits, labels[rows], rows_of(inputs.temperature, rows))
    logprob_T[rows], entropy_T[rows] = forward[0], forward[1]
    chunk = reference.clipped_policy_loss(
        forward[0],
        inputs.old_logprob_T[rows],
        inputs.advantage_T[rows],
        inputs.weight_T[rows],
        clip_low=inputs.clip_low,
        clip_high=inputs.clip_high,
        ref_logprob_T=None if inputs.ref_logprob_T is None else inputs.ref_logprob_T[rows],
        kl_coefficient=inputs.kl_coefficient,
    )
    if gradient is not None:
        d_entropy = torch.full_like(forward[1], inputs.entropy_weight)
        gradient.add(rows, logits, labels, inputs.temperature, forward, chunk.d_logprob_T, d_entropy)
    return chunk


def _add_up(chunks: list[reference.ClippedPolicyLoss], device: torch.device, dtype: torch.dtype) -> reference.ClippedPolicyLoss:
    """Sums and extremes over chunks; of no chunk, a loss of 0."""
    zero = torch.zeros((), device=device, dtype=dtype)
    infinity = torch.full((), math.inf, device=device, dtype=dtype)
    return reference.ClippedPolicyLoss(
        loss=sum((chunk.loss for chunk in chunks), zero),
        clipped_low=sum((chunk.clipped_low for chunk in chunks), zero),
        clipped_high=sum((chunk.clipped_high for chunk in chunks), zero),
        kl_sum=sum((chunk.kl_sum for chunk in chunks), zero),
        ratio_max=torch.stack([chunk.ratio_max for chunk in chunks] or [-infinity]).max(),
        ratio_min=torch.stack([chunk.ratio_min for chunk in chunks] or [infinity]).min(),
        d_logprob_T=zero,
    )
