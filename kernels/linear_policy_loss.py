"""The whole loss head in one pass over the vocabulary: loss, statistics, d_hidden and d_weight with 3 GEMMs.

    loss = sum_t weight_t · (clipped policy loss_t + kl_coefficient · k3_t)  +  entropy_weight · sum_t H_t

The gradient of the clipped loss by a token's logits depends on that token's own log-probability alone, so a chunk's d_logits are
formed as soon as its logits exist and the logits need not be computed twice. `entropy_weight` carries Targeted Entropy
Regularization: coefficient · sign(mean entropy - target) / tokens of the mini-batch on all ranks. The sign is the one global
quantity; the caller assumes it from the scoring pass, gets the true entropies back and repeats the pass where it assumed wrongly.

One custom operation (torch.ops.keju.linear_policy_loss) yields values and gradients; the backward hands the gradients out, scaled
in place. kernels/head.py holds the GEMMs and the memory, triton_policy.policy_rows the pass over a chunk on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.clipped_policy_loss import clipped_sums
from kernels.head import Head, check_tokens, gradient_dtype, wide_dtype
from kernels.linear_logprob_entropy import rows_of
from kernels.logprob_entropy import backend_of, logprob_entropy_backward_, logprob_entropy_forward, temperature_tensor
from kernels.reference import IGNORE


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
    """hidden_TD [T, D], weight_VD [V, D]: fp32, bf16, fp16 or fp64; holds at most a chunk of [T, V]. d_weight is summed in fp32.

    Gradients are formed in the forward where grad mode is on, and given out by ONE backward; a second raises RuntimeError.
    d_weight has the dtype `head.gradient_dtype` says: fp32 where a bf16 leaf sets grad_dtype to it, else the weight's. Raises
    ValueError for shapes that do not fit.
    """
    names = ("labels_T", "old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T")
    check_tokens(hidden_TD, **{name: getattr(inputs, name) for name in names})
    wide = wide_dtype(hidden_TD, weight_VD)
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    old_T, advantage_T, weight_T = (x.detach().to(wide) for x in (inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T))
    loss, sums_8, logprob_T, entropy_T, *_ = _loss(
        hidden_TD, weight_VD, inputs.labels_T, temperature_tensor(inputs.temperature, len(inputs.labels_T), hidden_TD),
        old_T, advantage_T, weight_T, None if inputs.ref_logprob_T is None else inputs.ref_logprob_T.detach().to(wide),
        inputs.clip_low, inputs.clip_high, inputs.kl_coefficient, inputs.entropy_weight, with_gradient, gradient_dtype(weight_VD),
    )  # fmt: skip
    policy_loss, low, high, kl, ref_kl, ratio_max, ratio_min, entropy_sum = sums_8.unbind()
    return PolicyLoss(loss, policy_loss, logprob_T, entropy_T, entropy_sum, low, high, kl, ref_kl, ratio_max, ratio_min)


@torch.library.custom_op("keju::linear_policy_loss", mutates_args=())
def _loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    ref_logprob_T: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    entropy_weight: float,
    with_gradient: bool,
    d_weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, [policy loss and the other sums, entropy_sum], logprob_T, entropy_T, d_hidden_TD, d_weight_VD)."""
    head = Head(hidden_TD, weight_VD, d_weight_dtype if with_gradient else None)
    logprob_T = hidden_TD.new_empty(len(hidden_TD), dtype=head.wide)
    entropy_T = torch.empty_like(logprob_T)
    # A token without weight is not looked at.
    labels_T = torch.where(weight_T != 0, labels_T, IGNORE)
    scalars = (clip_low, clip_high)
    for rows, logits_RV in head.logits():
        tokens = (old_logprob_T[rows], advantage_T[rows], weight_T[rows])
        ref_R = None if ref_logprob_T is None else ref_logprob_T[rows]
        temperature_R = rows_of(temperature, rows)
        if with_gradient and head.in_place:
            from kernels import triton_policy

            d_logits_RV = head.gradient_memory(rows)
            triton_policy.policy_rows(
                logits_RV, labels_T[rows], temperature_R.float(), *tokens, *scalars, ref_R, kl_coefficient, entropy_weight,
                logprob_T[rows], entropy_T[rows], d_logits_RV,
            )  # fmt: skip
            head.add(rows, d_logits_RV)
            continue
        logprob_R, entropy_R, saved_3R = logprob_entropy_forward(logits_RV, labels_T[rows], temperature_R)
        logprob_T[rows], entropy_T[rows] = logprob_R, entropy_R
        if with_gradient:
            _, d_logprob_R = clipped_sums(logprob_R, *tokens, *scalars, ref_R, kl_coefficient)
            d_entropy_R = torch.full_like(entropy_R, entropy_weight)
            head.add(rows, logprob_entropy_backward_(
                logits_RV, labels_T[rows], temperature_R, logprob_R, saved_3R, d_logprob_R, d_entropy_R))  # fmt: skip
    logits_RV = d_logits_RV = None  # else they keep the buffer alive in `d_weight`
    sums_7, _ = clipped_sums(logprob_T, old_logprob_T, advantage_T, weight_T, *scalars, ref_logprob_T, kl_coefficient)
    entropy_sum = entropy_T.sum()
    loss = sums_7[0] + entropy_weight * entropy_sum
    d_hidden_TD, d_weight_VD = (
        (head.d_hidden_TD, head.d_weight()) if with_gradient else (logprob_T.new_empty(0) for _ in range(2))
    )
    return loss, torch.cat((sums_7, entropy_sum.unsqueeze(0))), logprob_T, entropy_T, d_hidden_TD, d_weight_VD


@_loss.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = wide_dtype(hidden_TD, weight_VD)
    values = tuple(hidden_TD.new_empty(shape, dtype=wide) for shape in ((), (8,), hidden_TD.shape[:1], hidden_TD.shape[:1]))
    if not rest[-2]:
        return *values, *(hidden_TD.new_empty(0, dtype=wide) for _ in range(2))
    return *values, hidden_TD.new_empty(hidden_TD.shape), weight_VD.new_empty(weight_VD.shape, dtype=rest[-1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd would make up zeros for each output without a gradient, one of them as large as the weight.
    ctx.set_materialize_grads(False)
    # Not save_for_backward, which would keep a second reference to the gradients: the backward gives these very tensors to
    # autograd, which then takes them as .grad without a copy. They are as large as the weight.
    ctx.gradients = output[4:]


def _autograd_backward(ctx: Any, d_loss: Tensor, *_rest: Tensor) -> tuple:
    if ctx.gradients is None:
        raise RuntimeError("linear_policy_loss: its gradients were given out by a backward before; compute the loss again")
    (d_hidden_TD, d_weight_VD), ctx.gradients = ctx.gradients, None
    if d_hidden_TD.numel() or d_weight_VD.numel():
        _scale_(d_hidden_TD, d_loss)
        _scale_(d_weight_VD, d_loss)
    return d_hidden_TD, d_weight_VD, *(None,) * 12


_loss.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op("keju::scale_", mutates_args=("numbers",))
def _scale_(numbers: Tensor, factor: Tensor) -> None:
    """numbers *= factor, one number on the same device; where it is 1, as in most backwards, no memory is touched."""
    if backend_of(numbers) == "triton":
        from kernels import triton_policy

        triton_policy.scale_(numbers, factor.float())
    elif not factor.is_cpu:
        numbers.mul_(factor.to(numbers.dtype))
    elif factor.item() != 1:
        numbers.mul_(factor.item())  # as a number it is not rounded to bf16 first


@_scale_.register_fake
def _(*_all: Tensor) -> None:
    return None
