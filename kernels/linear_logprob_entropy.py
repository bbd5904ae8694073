"""Log-probability and entropy straight from hidden states and the output weight, never holding more than a chunk of the logits.

    logits_TV = hidden_TD @ weight_VD^T      in chunks of rows, fp32, one at a time

Forward alone is 1 GEMM. With gradient the logits are needed again in backward, as the gradient that comes in is not known before.
The last chunk's stay until then; those of the chunks before are computed again. So it is 3 GEMMs where all tokens are one chunk,
towards 4 where they are many; `linear_policy_loss`, which knows the gradient, needs 3. Under torch.compile, and in a second
backward through the same graph, nothing was kept. Two custom operations (torch.ops.keju.linear_logprob_entropy, …_backward);
kernels/head.py holds the GEMMs and the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.head import Head, buffer_shape, check_tokens, gradient_dtype, wide_dtype
from kernels.logprob_entropy import logprob_entropy_backward_, logprob_entropy_forward, temperature_tensor


def linear_logprob_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.logprob_entropy` of hidden_TD @ weight_VD^T; differentiable by hidden_TD and weight_VD.

    hidden_TD [T, D], weight_VD [V, D]: fp32, bf16, fp16 or fp64. labels_T [T] int64, IGNORE allowed. temperature: scalar or [T].
    Returns (logprob_T, entropy_T), fp32 (fp64 for fp64), nats. d_weight is summed over chunks in fp32 and has the dtype
    `head.gradient_dtype` says. Where a gradient is wanted, one chunk of the logits is held until the backward. Errors as
    `logprob_entropy`'s.
    """
    check_tokens(hidden_TD, labels_T=labels_T)
    temperature = temperature_tensor(temperature, len(labels_T), hidden_TD)
    differentiable = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    traced = torch.compiler.is_compiling() or type(hidden_TD) not in (Tensor, Parameter)
    keep = differentiable and not traced
    logprob_T, entropy_T, _, _ = _forward(hidden_TD, weight_VD, labels_T, temperature, gradient_dtype(weight_VD), keep)
    return logprob_T, entropy_T


@torch.library.custom_op("keju::linear_logprob_entropy", mutates_args=())
def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    d_weight_dtype: torch.dtype,  # noqa: ARG001  (for `_setup_context` alone)
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last: the buffer with the last chunk's logits where `keep`, else empty."""
    head = Head(hidden_TD, weight_VD)
    logprob_T = hidden_TD.new_empty(len(hidden_TD), dtype=head.wide)
    entropy_T, saved_3T = torch.empty_like(logprob_T), logprob_T.new_empty(3, len(hidden_TD))
    for rows, logits_RV in head.logits():
        logprob_T[rows], entropy_T[rows], saved_3T[:, rows] = logprob_entropy_forward(
            logits_RV, labels_T[rows], rows_of(temperature, rows)
        )
    return logprob_T, entropy_T, saved_3T, head.buffer if keep else logprob_T.new_empty(0)


@torch.library.custom_op("keju::linear_logprob_entropy_backward", mutates_args=())
def _backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
    d_weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _gradients(
        Head(hidden_TD, weight_VD, d_weight_dtype), labels_T, temperature, logprob_T, saved_3T, d_logprob_T, d_entropy_T
    )


def _gradients(
    head: Head,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d_hidden_TD, d_weight_VD)."""
    for rows, logits_RV in head.logits():
        arguments = (labels_T[rows], rows_of(temperature, rows), logprob_T[rows], saved_3T[:, rows].contiguous(),
                     d_logprob_T[rows], d_entropy_T[rows])  # fmt: skip
        if head.in_place:
            from kernels import triton_rows

            d_logits_RV = head.gradient_memory(rows)
            triton_rows.backward(logits_RV, arguments[0], arguments[1].float(), *arguments[2:], d_logits_RV)
        else:
            d_logits_RV = logprob_entropy_backward_(logits_RV, *arguments)
        head.add(rows, d_logits_RV)
    logits_RV = d_logits_RV = None  # else they keep the buffer alive in `d_weight`
    return head.d_hidden_TD, head.d_weight()


@_forward.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(hidden_TD, weight_VD)
    rows = hidden_TD.shape[0]
    kept = buffer_shape(hidden_TD, weight_VD) if rest[-1] else (0,)
    return tuple(hidden_TD.new_empty(shape, dtype=dtype) for shape in ((rows,), (rows,), (3, rows), kept))


@_backward.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return hidden_TD.new_empty(hidden_TD.shape), weight_VD.new_empty(weight_VD.shape, dtype=rest[-1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.d_weight_dtype, keep = inputs
    logprob_T, _, saved_3T, kept_RV = output
    ctx.kept_RV = kept_RV if keep else None  # not a saved tensor: the first backward writes over it, a second must not see it
    ctx.mark_non_differentiable(saved_3T, kept_RV)
    ctx.save_for_backward(*tensors, logprob_T, saved_3T)


def _autograd_backward(ctx: Any, d_logprob_T: Tensor, d_entropy_T: Tensor, *_unused: Tensor) -> tuple:
    incoming = d_logprob_T, d_entropy_T
    if ctx.kept_RV is None or torch.is_grad_enabled():  # the latter asks for a second derivative, which the operation refuses
        d_hidden_TD, d_weight_VD = _backward(*ctx.saved_tensors, *incoming, ctx.d_weight_dtype)
    else:
        hidden_TD, weight_VD, *rest = ctx.saved_tensors
        head, ctx.kept_RV = Head(hidden_TD, weight_VD, ctx.d_weight_dtype, ctx.kept_RV), None
        d_hidden_TD, d_weight_VD = _gradients(head, *rest, *incoming)
    return d_hidden_TD, d_weight_VD, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def rows_of(temperature: Tensor, rows: slice) -> Tensor:
    """The temperature of a chunk: one for all, or its rows."""
    return temperature[rows] if temperature.numel() > 1 else temperature
