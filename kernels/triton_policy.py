"""The clipped policy loss in Triton: over all tokens in one launch, and over a chunk of logits together with their gradient.

`clipped_loss` runs as ONE program: 16K tokens are 8 turns of 2048, each one round trip to memory of about a microsecond, and sums
that no other program takes part in need no second launch, no atomics and come out bitwise the same.

`policy_rows` is the row pass of `linear_policy_loss`: with a chunk's fp32 logits in memory, each program scans its row, knows
from log p alone how the clipped loss slopes (kernels/reference.py), and turns the row into d_logits at once, from the end
backwards, narrowed to the dtype of the GEMMs that follow. One launch, two reads (the second partly from the L2 cache) and one
write of half the width, where separate launches would need the memory of the gradient beside that of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import check_device, launch
from kernels.triton_rows import (
    IGNORED,
    check_row,
    exp,
    exp_tail,
    expm1,
    scan_row,
    tile_shape,
    write_gradient,
    zero_row,
)

TOKENS = 2048
"""Tokens that `clipped_loss` has at work at a time."""
LOSS_WARPS = 16


@triton.jit
def _exp(x):
    return tl.where(tl.abs(x) < 0.5, 1.0 + (x + exp_tail(x)), exp(x))


@triton.jit
def _token_loss(logprob, old_logprob, advantage, clip_low, clip_high):
    """(loss, slope by logprob, cut low, cut high, ratio, log ratio) of tokens: `reference.clipped_policy_loss`."""
    log_ratio = logprob - old_logprob
    ratio = _exp(log_ratio)
    # An advantage of 0 gives a loss of 0 also where the ratio has overflown; NaN stays.
    free = tl.where((advantage == 0) & (ratio == float("inf")), 0.0, -ratio * advantage)
    inside = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    held = -tl.where(ratio != ratio, ratio, inside) * advantage
    low = (advantage < 0) & (ratio < 1.0 - clip_low)
    high = (advantage > 0) & (ratio > 1.0 + clip_high)
    loss = tl.maximum(free, held, propagate_nan=tl.PropagateNan.ALL)
    return loss, tl.where(low | high, 0.0, free), low, high, ratio, log_ratio


@triton.jit
def _take(numbers, here, inside, active, MASKED: tl.constexpr):
    """Numbers of tokens; 0 for one without weight, which may hold anything, NaN included."""
    loaded = tl.load(numbers + here, mask=inside, other=0.0) if MASKED else tl.load(numbers + here)
    return tl.where(active, loaded, 0.0)


@triton.jit
def _add_tokens(
    start, tokens, logprobs, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, kl_coefficient, slopes,
    loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest,
    TOKENS: tl.constexpr, HAS_REFERENCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds TOKENS tokens to each lane's sums and writes their slopes. Without a mask every access is 16 bytes wide."""
    here = start + tl.arange(0, TOKENS)
    inside = here < tokens
    weight = tl.load(weights + here, mask=inside, other=0.0) if MASKED else tl.load(weights + here)
    active = weight != 0
    logprob = _take(logprobs, here, inside, active, MASKED)
    old_logprob = _take(old_logprobs, here, inside, active, MASKED)
    advantage = _take(advantages, here, inside, active, MASKED)
    loss, slope, low, high, ratio, log_ratio = _token_loss(logprob, old_logprob, advantage, clip_low, clip_high)
    if HAS_REFERENCE:
        gap = _take(ref_logprobs, here, inside, active, MASKED) - logprob
        ref_kl = exp_tail(gap)
        loss += kl_coefficient * ref_kl
        slope -= kl_coefficient * expm1(gap)
        ref_sum += tl.where(active, ref_kl, 0.0)
    slope = tl.where(active, slope * weight, 0.0)
    if MASKED:
        tl.store(slopes + here, slope, mask=inside)
    else:
        tl.store(slopes + here, slope)
    loss_sum += tl.where(active, loss * weight, 0.0)
    low_sum += tl.where(active & low, 1.0, 0.0)
    high_sum += tl.where(active & high, 1.0, 0.0)
    kl_sum += tl.where(active, exp_tail(log_ratio), 0.0)
    highest = tl.maximum(highest, tl.where(active, ratio, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    lowest = tl.minimum(lowest, tl.where(active, ratio, float("inf")), propagate_nan=tl.PropagateNan.ALL)
    return loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest


@triton.jit(do_not_specialize=["tokens"])
def clipped_loss_kernel(
    logprobs, old_logprobs, advantages, weights, ref_logprobs, tokens, clip_low, clip_high, kl_coefficient, sums, slopes,
    TOKENS: tl.constexpr, HAS_REFERENCE: tl.constexpr,
):  # fmt: skip
    loss_sum = tl.zeros((TOKENS,), tl.float32)
    low_sum = tl.zeros((TOKENS,), tl.float32)
    high_sum = tl.zeros((TOKENS,), tl.float32)
    kl_sum = tl.zeros((TOKENS,), tl.float32)
    ref_sum = tl.zeros((TOKENS,), tl.float32)
    highest = tl.full((TOKENS,), float("-inf"), tl.float32)
    lowest = tl.full((TOKENS,), float("inf"), tl.float32)
    whole = tokens // TOKENS * TOKENS
    for start in range(0, whole, TOKENS):
        loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest = _add_tokens(
            start, tokens, logprobs, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, kl_coefficient, slopes,
            loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest, TOKENS, HAS_REFERENCE, False,
        )  # fmt: skip
    if whole < tokens:
        loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest = _add_tokens(
            whole, tokens, logprobs, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, kl_coefficient, slopes,
            loss_sum, low_sum, high_sum, kl_sum, ref_sum, highest, lowest, TOKENS, HAS_REFERENCE, True,
        )  # fmt: skip
    # The reductions to one number drop NaN from extremes, so it is put back.
    lost = tl.sum((highest != highest).to(tl.int32), 0) > 0
    tl.store(sums, tl.sum(loss_sum, 0))
    tl.store(sums + 1, tl.sum(low_sum, 0))
    tl.store(sums + 2, tl.sum(high_sum, 0))
    tl.store(sums + 3, tl.sum(kl_sum, 0))
    tl.store(sums + 4, tl.sum(ref_sum, 0))
    tl.store(sums + 5, tl.where(lost, float("nan"), tl.max(highest, 0)))
    tl.store(sums + 6, tl.where(lost, float("nan"), tl.min(lowest, 0)))


@triton.jit
def policy_rows_kernel(
    logits, row_stride, vocabulary, labels, temperatures, temperature_stride, old_logprobs, advantages, weights, ref_logprobs,
    clip_low, clip_high, kl_coefficient, entropy_weight, logprobs, entropies, d_logits, d_row_stride,
    LANES: tl.constexpr, VECTOR: tl.constexpr, HAS_REFERENCE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + t)
    temperature = tl.load(temperatures + t * temperature_stride)
    weight = tl.load(weights + t)
    check_row(label, vocabulary, temperature)
    d_row = d_logits + t * d_row_stride
    if (label == IGNORED) | (weight == 0):
        tl.store(logprobs + t, 0.0)
        tl.store(entropies + t, 0.0)
        zero_row(d_row, vocabulary, LANES, VECTOR)
    else:
        row = logits + t * row_stride
        label_logit = tl.load(row + label).to(tl.float32)
        column = label.to(tl.int32)
        logprob, entropy, top, total, mean = scan_row(row, column, vocabulary, temperature, label_logit, LANES, VECTOR)
        tl.store(logprobs + t, logprob)
        tl.store(entropies + t, entropy)
        _, slope, _, _, _, _ = _token_loss(logprob, tl.load(old_logprobs + t), tl.load(advantages + t), clip_low, clip_high)
        if HAS_REFERENCE:
            slope -= kl_coefficient * expm1(tl.load(ref_logprobs + t) - logprob)
        write_gradient(
            row, d_row, column, vocabulary, label_logit, temperature, logprob, top, total, mean, slope * weight, entropy_weight,
            LANES, VECTOR,
        )  # fmt: skip


@triton.jit
def scale_kernel(numbers, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(numbers + here, mask=here < count, other=0.0).to(tl.float32) * by
        tl.store(numbers + here, scaled.to(numbers.dtype.element_ty), mask=here < count)


def clipped_loss(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, weight_T: Tensor, clip_low: float, clip_high: float,
    ref_logprob_T: Tensor | None, kl_coefficient: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums_7, d_logprob_T), fp32: sums_7 as `reference.ClippedPolicyLoss` has them, loss first. Inputs [T] fp32."""
    check_device(logprob_T)
    sums_7 = torch.empty(7, dtype=torch.float32, device=logprob_T.device)
    d_logprob_T = torch.empty(len(logprob_T), dtype=torch.float32, device=logprob_T.device)
    launch(
        clipped_loss_kernel, 1, logprob_T.contiguous(), old_logprob_T.contiguous(), advantage_T.contiguous(),
        weight_T.contiguous(), logprob_T if ref_logprob_T is None else ref_logprob_T.contiguous(), len(logprob_T),
        clip_low, clip_high, kl_coefficient, sums_7, d_logprob_T,
        device=logprob_T.device, TOKENS=TOKENS, HAS_REFERENCE=ref_logprob_T is not None, num_warps=LOSS_WARPS,
    )  # fmt: skip
    return sums_7, d_logprob_T


def policy_rows(
    logits_TV: Tensor, labels_T: Tensor, temperature: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, weight_T: Tensor,
    clip_low: float, clip_high: float, ref_logprob_T: Tensor | None, kl_coefficient: float, entropy_weight: float,
    logprob_T: Tensor, entropy_T: Tensor, d_logits_TV: Tensor,
) -> None:  # fmt: skip
    """Fills logprob_T, entropy_T [T] fp32 and d_logits_TV from fp32 logits.

    d_logits_TV: the logits themselves or `triton_rows.narrowed` of them. Rows of weight 0 or label IGNORE give 0 everywhere. The
    rest as `linear_policy_loss` has it, a chunk of it.
    """
    check_device(logits_TV)
    rows, vocabulary = logits_TV.shape
    launch(
        policy_rows_kernel, rows, logits_TV, logits_TV.stride(0), vocabulary, labels_T.contiguous(), temperature.contiguous(),
        int(temperature.numel() > 1), old_logprob_T.contiguous(), advantage_T.contiguous(), weight_T.contiguous(),
        logprob_T if ref_logprob_T is None else ref_logprob_T.contiguous(), clip_low, clip_high, kl_coefficient, entropy_weight,
        logprob_T, entropy_T, d_logits_TV, d_logits_TV.stride(0),
        device=logits_TV.device, HAS_REFERENCE=ref_logprob_T is not None, **tile_shape(logits_TV.dtype),
    )  # fmt: skip


def scale_(numbers: Tensor, factor: Tensor) -> None:
    """numbers *= factor (one fp32 number on the same device), which costs a launch alone where the factor is 1."""
    check_device(numbers)
    block = 8192
    launch(
        scale_kernel, triton.cdiv(numbers.numel(), block), numbers, factor, numbers.numel(),
        device=numbers.device, BLOCK=block, num_warps=8,
    )  # fmt: skip
