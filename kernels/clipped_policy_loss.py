"""The clipped-ratio policy loss over all tokens and its statistics, in one launch; `reference.clipped_policy_loss` defines it.

The gradient by a token's log-probability is known as soon as the loss is, so the forward yields both and the backward multiplies.
One custom operation (torch.ops.keju.clipped_policy_loss): triton_policy on CUDA, csrc/cpu/clipped_policy_loss.cpp on a CPU, the
definition elsewhere. Left out: gradients by anything but logprob_T, and second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.logprob_entropy import backend_of
from kernels.reference import ClippedPolicyLoss


def clipped_policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logprob_T: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> ClippedPolicyLoss:
    """As `reference.clipped_policy_loss`, with `loss` differentiable by logprob_T and the rest detached.

    All [T] floating on one device; computed in fp32, or fp64 where logprob_T is fp64. Two calls give the same bits.
    Raises ValueError for a shape that does not fit.
    """
    dtype = torch.promote_types(logprob_T.dtype, torch.float32)
    others = {"old_logprob_T": old_logprob_T, "advantage_T": advantage_T, "weight_T": weight_T, "ref_logprob_T": ref_logprob_T}
    for name, tensor_T in others.items():
        if tensor_T is not None and (tensor_T.shape != logprob_T.shape or tensor_T.dim() != 1):
            raise ValueError(f"{name}: expected {list(logprob_T.shape)} as logprob_T, got {list(tensor_T.shape)}")
    ref_logprob_T = None if ref_logprob_T is None else ref_logprob_T.detach().to(dtype)
    loss, sums_7, d_logprob_T = _loss(
        logprob_T.to(dtype), *(tensor_T.detach().to(dtype) for tensor_T in (old_logprob_T, advantage_T, weight_T)),
        clip_low, clip_high, ref_logprob_T, kl_coefficient,
    )  # fmt: skip
    return ClippedPolicyLoss(loss, *sums_7[1:].unbind(), d_logprob_T)


def clipped_sums(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, weight_T: Tensor, clip_low: float, clip_high: float,
    ref_logprob_T: Tensor | None, kl_coefficient: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums_7, d_logprob_T): ClippedPolicyLoss's first seven fields as one tensor. Inputs [T], all fp32 or all fp64."""
    arguments = (logprob_T, old_logprob_T, advantage_T, weight_T)
    backend = backend_of(logprob_T)
    if backend == "triton":
        from kernels import triton_policy

        return triton_policy.clipped_loss(*arguments, clip_low, clip_high, ref_logprob_T, kl_coefficient)
    if backend == "native":
        contiguous = (tensor_T.contiguous() for tensor_T in arguments)
        reference_T = None if ref_logprob_T is None else ref_logprob_T.contiguous()
        return torch.ops.keju.clipped_policy_loss_native(*contiguous, clip_low, clip_high, reference_T, kl_coefficient)
    result = reference.clipped_policy_loss(
        *arguments, clip_low=clip_low, clip_high=clip_high, ref_logprob_T=ref_logprob_T, kl_coefficient=kl_coefficient
    )
    return torch.stack([field.to(logprob_T.dtype) for field in result[:7]]), result.d_logprob_T


@torch.library.custom_op("keju::clipped_policy_loss", mutates_args=())
def _loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logprob_T: Tensor | None,
    kl_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (logprob_T, old_logprob_T, advantage_T, weight_T, clip_low, clip_high, ref_logprob_T, kl_coefficient)
    sums_7, d_logprob_T = clipped_sums(*arguments)
    return sums_7[0].clone(), sums_7, d_logprob_T


@_loss.register_fake
def _(logprob_T: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprob_T.new_empty(()), logprob_T.new_empty(7), logprob_T.new_empty(logprob_T.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ARG001
    _, sums_7, d_logprob_T = output
    ctx.mark_non_differentiable(sums_7, d_logprob_T)
    ctx.save_for_backward(d_logprob_T)


def _backward(ctx: Any, d_loss: Tensor, _d_sums: Tensor, _d_slope: Tensor) -> tuple:
    (d_logprob_T,) = ctx.saved_tensors
    return d_logprob_T * d_loss, *(None,) * 7


_loss.register_autograd(_backward, setup_context=_setup_context)
