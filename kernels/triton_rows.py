"""The row kernels of logprob_entropy in Triton: one program a row. kernels/logprob_entropy.py has the mathematics.

All in base 2: with c = log2(e)/temperature and M' = max_j x_j · c rounded once, a'_j = fma(x_j, c, -M') loses nothing that the
logits hold, and 2^a' is the GPU's own instruction. Columns are dealt to lanes in vectors of 16 bytes; each lane keeps its own
(M, S, W = sum 2^a' a'), and rescales it once a vector: 1 + 1/8 exponentials a bf16 logit (1 + 1/4 for fp32). A lane's sum has
few terms, and lanes are added in a tree, always in the same order.

    traffic     forward one read, backward one read and one write
    arithmetic  an H200 moves 2.1e12 bf16 logits/s at 4.3 TB/s; its 132 · 16 exponential units give 3.7e12/s, so a second
                exponential a logit (a rescale for each) would be the bottleneck, and an eighth of one is not
    latency     4.3 TB/s times 0.7 us is 23 KB in flight for each of 132 processors: with two vectors a lane now, two on their way
                and 1024 lanes a processor it is 64 KB

The label's column stays out of the sums, so that nothing cancels where p_y is near 1; `_close` adds it. NaN logits give NaN.
Logits of -inf, or of a mask's -3.4e38, have a' floored at FLOOR, where 2^a' is 0 and a' is finite. A row's largest |logit| · c
must stay below 1e8: beyond, the half last place by which M' is rounded, and every a' with it, is more than a few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import IGNORE
from kernels.triton_launch import check_device, launch

IGNORED = tl.constexpr(IGNORE)
FLOOR = tl.constexpr(-200.0)
"""2^FLOOR is 0 in fp32."""
LOWEST = tl.constexpr(-3.4e38)
"""Below every logit and M': finite, so that a leading run of -inf gives no inf - inf."""
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500e-8)
"""What fp32 loses of LOG2E."""

WARPS = 8
VECTORS = 2
"""16-byte vectors that a lane has at work, and again on their way."""


def tile_shape(dtype: torch.dtype, warps: int = WARPS, vectors: int = VECTORS) -> dict[str, int]:
    """LANES × VECTOR logits at a time: `vectors` vectors of 16 bytes for each of 32 · warps threads."""
    return {"LANES": 32 * warps * vectors, "VECTOR": 16 // dtype.itemsize, "num_warps": warps}


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1], to relative accuracy (W. Kahan): the rounding of 1 + u divides out."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))


@triton.jit
def exp(x):
    """exp(x) for x whose product with log2(e) is kept in two floats: rounded, as in tl.exp, it costs |x| · 6e-8 of accuracy."""
    power = x * LOG2E
    rest = tl.fma(x, LOG2E, -power) + x * LOG2E_REST
    return tl.exp2(power) * (1.0 + tl.where(tl.abs(power) < float("inf"), rest * LN2, 0.0))


@triton.jit
def exp_tail(x):
    """exp(x) - 1 - x, never negative: a series where |x| < 1/2, in which the difference would cancel."""
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = 1.0 / 3628800.0
    series = series * near + 1.0 / 362880.0
    series = series * near + 1.0 / 40320.0
    series = series * near + 1.0 / 5040.0
    series = series * near + 1.0 / 720.0
    series = series * near + 1.0 / 120.0
    series = series * near + 1.0 / 24.0
    series = series * near + 1.0 / 6.0
    series = series * near + 0.5
    return tl.where(tl.abs(x) < 0.5, series * near * near, exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + exp_tail(x), exp(x) - 1.0)


@triton.jit
def _scaled(highest, scale):
    """M' of a largest logit M; finite, whatever the scale, where no logit has been seen."""
    return tl.maximum(highest * scale, LOWEST)


@triton.jit
def _add(x, highest, total, weighted, scale):
    """Adds a tile of logits [LANES, VECTOR] to each lane's M, S and W."""
    new = tl.maximum(highest, tl.max(x, 1))
    new_scaled = _scaled(new, scale)
    a = tl.maximum(tl.fma(x, scale, -new_scaled[:, None]), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(a)
    gap = tl.maximum(_scaled(highest, scale) - new_scaled, FLOOR)
    rescale = tl.exp2(gap)
    weighted = rescale * (weighted + gap * total) + tl.sum(e * a, 1)
    total = rescale * total + tl.sum(e, 1)
    return new, total, weighted


@triton.jit
def _scan(row, label, vocabulary, scale, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(M, S, W) of all columns but the label's. The next tile is on its way while one is added."""
    TILE: tl.constexpr = LANES * VECTOR
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    highest = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    whole = vocabulary // TILE * TILE
    if whole > 0:
        x = tl.load(row + columns)
        for start in range(TILE, whole, TILE):
            following = tl.load(row + start + columns)
            x = tl.where(columns == label - (start - TILE), float("-inf"), x.to(tl.float32))
            highest, total, weighted = _add(x, highest, total, weighted, scale)
            x = following
        x = tl.where(columns == label - (whole - TILE), float("-inf"), x.to(tl.float32))
        highest, total, weighted = _add(x, highest, total, weighted, scale)
    if whole < vocabulary:
        x = tl.load(row + whole + columns, mask=columns < vocabulary - whole, other=float("-inf"))
        x = tl.where(columns == label - whole, float("-inf"), x.to(tl.float32))
        highest, total, weighted = _add(x, highest, total, weighted, scale)
    top = tl.max(highest, 0)
    gap = tl.maximum(_scaled(highest, scale) - _scaled(top, scale), FLOOR)
    rescale = tl.exp2(gap)
    return top, tl.sum(rescale * total, 0), tl.sum(rescale * (weighted + gap * total), 0)


@triton.jit
def _difference(a, b):
    """(a - b, what its rounding lost): their sum is exact (D. Knuth's TwoSum)."""
    hi = a - b
    v = hi - a
    return hi, (a - (hi - v)) + (-b - v)


@triton.jit
def _margin(top, total, weighted, label_logit, scale, temperature):
    """d = (x_y - M)/temperature - log S in two floats: the label's logit over the log of all others' sum.

    All that was rounded once a row on the way to S counts in full here, so it is put right to first order: S holds the exponents
    x c - M' with c and M' rounded, which is off by LN2 (M' - M c) and by c's error times the mean exponent W/S.
    """
    gap, gap_rest = _difference(label_logit, top)
    inverse = tl.div_rn(1.0, temperature)
    inverse_rest = tl.fma(-inverse, temperature, 1.0) * inverse
    d = gap * inverse
    rest = tl.fma(gap, inverse, -d) + (gap_rest * inverse + gap * inverse_rest)
    scale_rest = (tl.fma(-scale, temperature, LOG2E) + LOG2E_REST) * inverse
    log_rest = LN2 * (scale_rest / scale * (weighted / total) - tl.fma(top, scale, -_scaled(top, scale)))
    hi, lost = _difference(d, tl.log(total))
    finite = tl.abs(hi) < float("inf")
    # The rest is added in, and not left to `_close`'s first order: logits of 1e4 at a temperature of 0.01 make it 0.06.
    hi, lost = _difference(hi, tl.where(finite, log_rest - rest - lost, 0.0))
    return hi, tl.where(finite, lost, 0.0)


@triton.jit
def _close(top, total, weighted, label_logit, scale, temperature):
    """(logprob, entropy, M', S, mean in nats): the label joins the others. csrc/cpu/logprob_entropy_rows.h derives it."""
    d, rest = _margin(top, total, weighted, label_logit, scale, temperature)
    small = log1p(exp(-tl.abs(d)) * (1.0 - tl.where(d > 0, rest, -rest)))
    logprob = tl.where(d > 0, -small, d + (rest - small))
    log_others = tl.where(d > 0, -d - (rest + small), -small)
    label_part = tl.where(logprob < -100.0, 0.0, exp(logprob) * logprob)
    others_part = exp(log_others) * (tl.log(total) - weighted / total * LN2 - log_others)
    entropy = others_part - label_part
    # A vocabulary whose other logits are all -inf leaves the label alone, with certainty; a row of nothing but -inf is no
    # distribution.
    alone = total == 0
    empty = alone & (label_logit == float("-inf"))
    logprob = tl.where(empty, float("nan"), tl.where(alone, 0.0, tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    entropy = tl.where(empty, float("nan"), tl.where(alone | (entropy < 0), 0.0, entropy))
    others = _scaled(top, scale)
    highest = tl.maximum(others, label_logit * scale)
    gap = tl.maximum(others - highest, FLOOR)
    a = tl.maximum(tl.fma(label_logit, scale, -highest), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(a)
    rescale = tl.exp2(gap)
    everything = rescale * total + e
    mean = (rescale * (weighted + gap * total) + e * a) / everything * LN2
    return logprob, entropy, highest, everything, mean


@triton.jit
def _gradient(x, top, scale, constant, slope):
    a = tl.maximum(tl.fma(x.to(tl.float32), scale, -top), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(a) * (constant + slope * a)


@triton.jit
def _write(row, d_row, label, vocabulary, top, scale, constant, slope, at_label, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """d_x_j = 2^a' (constant + slope a'), and `at_label` in the label's column. From the last column to the first.

    `row` and `d_row` may be the same, or d_row the upper half of the row's own bytes in a type of half the size: then element j
    lands on the logits from (columns + j)/2 on, which lie behind j and were read before. By every thread: hence the barrier.
    Descending also meets first what the forward pass left in the L2 cache, when both run in one kernel.
    """
    TILE: tl.constexpr = LANES * VECTOR
    NARROWS: tl.constexpr = d_row.dtype.element_ty.primitive_bitwidth < row.dtype.element_ty.primitive_bitwidth
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    whole = vocabulary // TILE * TILE
    if whole < vocabulary:
        mask = columns < vocabulary - whole
        x = tl.load(row + whole + columns, mask=mask, other=0.0)
        if NARROWS:
            tl.debug_barrier()
        d = tl.where(columns == label - whole, at_label, _gradient(x, top, scale, constant, slope))
        tl.store(d_row + whole + columns, d.to(d_row.dtype.element_ty), mask=mask)
    if whole > 0:
        x = tl.load(row + (whole - TILE) + columns)
        for done in range(TILE, whole, TILE):
            start = whole - done
            following = tl.load(row + (start - TILE) + columns)
            if NARROWS:
                tl.debug_barrier()
            d = tl.where(columns == label - start, at_label, _gradient(x, top, scale, constant, slope))
            tl.store(d_row + start + columns, d.to(d_row.dtype.element_ty))
            x = following
        if NARROWS:
            tl.debug_barrier()
        d = tl.where(columns == label, at_label, _gradient(x, top, scale, constant, slope))
        tl.store(d_row + columns, d.to(d_row.dtype.element_ty))


@triton.jit
def write_gradient(
    row, d_row, label, vocabulary, label_logit, temperature, logprob, top, total, mean, d_logprob, d_entropy,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of a row from its closing numbers: `top` is M', `total` is S, `mean` in nats."""
    scale = tl.div_rn(LOG2E, temperature)
    over = -1.0 / (total * temperature)
    constant = over * (d_logprob - d_entropy * mean)
    slope = over * d_entropy * LN2
    a = tl.fma(label_logit, scale, -top) * LN2
    p = exp(logprob)
    entropy_part = tl.where(p == 0, 0.0, p * (a - mean))
    at_label = (-expm1(logprob) * d_logprob - d_entropy * entropy_part) / temperature
    # The stores are to be 16 bytes wide, the loads may be twice that.
    WIDE: tl.constexpr = 128 // d_row.dtype.element_ty.primitive_bitwidth
    _write(row, d_row, label, vocabulary, top, scale, constant, slope, at_label, LANES * VECTOR // WIDE, WIDE)


@triton.jit
def scan_row(row, label, vocabulary, temperature, label_logit, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(logprob, entropy, M', S, mean) of a row."""
    scale = tl.div_rn(LOG2E, temperature)
    top, total, weighted = _scan(row, label, vocabulary, scale, LANES, VECTOR)
    return _close(top, total, weighted, label_logit, scale, temperature)


@triton.jit
def check_row(label, vocabulary, temperature):
    tl.device_assert((label == IGNORED) | ((label >= 0) & (label < vocabulary)), "labels_T: a label lies outside the vocabulary")
    tl.device_assert(temperature > 0, "temperature: not positive")


@triton.jit
def zero_row(d_row, vocabulary, LANES: tl.constexpr, VECTOR: tl.constexpr):
    columns = tl.arange(0, LANES * VECTOR)
    for start in range(0, vocabulary, LANES * VECTOR):
        zero = tl.zeros((LANES * VECTOR,), d_row.dtype.element_ty)
        tl.store(d_row + start + columns, zero, mask=columns < vocabulary - start)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits, row_stride, vocabulary, labels, temperatures, temperature_stride, logprobs, entropies, saved, rows,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + t)
    temperature = tl.load(temperatures + t * temperature_stride)
    check_row(label, vocabulary, temperature)
    if label == IGNORED:
        tl.store(logprobs + t, 0.0)
        tl.store(entropies + t, 0.0)
        tl.store(saved + t, 0.0)
        tl.store(saved + rows + t, 1.0)
        tl.store(saved + 2 * rows + t, 0.0)
    else:
        row = logits + t * row_stride
        label_logit = tl.load(row + label).to(tl.float32)
        logprob, entropy, top, total, mean = scan_row(
            row, label.to(tl.int32), vocabulary, temperature, label_logit, LANES, VECTOR
        )
        tl.store(logprobs + t, logprob)
        tl.store(entropies + t, entropy)
        tl.store(saved + t, top)
        tl.store(saved + rows + t, total)
        tl.store(saved + 2 * rows + t, mean)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    logits, row_stride, vocabulary, labels, temperatures, temperature_stride, logprobs, saved, rows, d_logprobs, d_entropies,
    d_logits, d_row_stride, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + t)
    temperature = tl.load(temperatures + t * temperature_stride)
    check_row(label, vocabulary, temperature)
    d_row = d_logits + t * d_row_stride
    if label == IGNORED:
        zero_row(d_row, vocabulary, LANES, VECTOR)
    else:
        row = logits + t * row_stride
        label_logit = tl.load(row + label).to(tl.float32)
        write_gradient(
            row, d_row, label.to(tl.int32), vocabulary, label_logit, temperature, tl.load(logprobs + t), tl.load(saved + t),
            tl.load(saved + rows + t), tl.load(saved + 2 * rows + t), tl.load(d_logprobs + t), tl.load(d_entropies + t),
            LANES, VECTOR,
        )  # fmt: skip


def forward(logits_TV: Tensor, labels_T: Tensor, temperature: Tensor, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_T, entropy_T, saved_3T), fp32. saved_3T: M' (base 2, divided by the temperature), S and mean of each row.

    logits_TV [T, V] fp32, bf16 or fp16 of column stride 1; labels_T [T] int64; temperature [1] or [T] fp32. A label or a
    temperature out of range stops the device with an assertion. shape: `tile_shape`, where another than the usual is wanted.
    """
    check_device(logits_TV)
    rows, vocabulary = logits_TV.shape
    logprob_T = torch.empty(rows, dtype=torch.float32, device=logits_TV.device)
    entropy_T = torch.empty_like(logprob_T)
    saved_3T = torch.empty(3, rows, dtype=torch.float32, device=logits_TV.device)
    launch(
        forward_kernel, rows, logits_TV, logits_TV.stride(0), vocabulary, labels_T.contiguous(), temperature.contiguous(),
        int(temperature.numel() > 1), logprob_T, entropy_T, saved_3T, rows,
        device=logits_TV.device, **(shape or tile_shape(logits_TV.dtype)),
    )  # fmt: skip
    return logprob_T, entropy_T, saved_3T


def backward(
    logits_TV: Tensor, labels_T: Tensor, temperature: Tensor, logprob_T: Tensor, saved_3T: Tensor,
    d_logprob_T: Tensor, d_entropy_T: Tensor, d_logits_TV: Tensor, **shape: int,
) -> None:  # fmt: skip
    """Fills d_logits_TV: the logits themselves, `narrowed` of them, or memory of its own. The rest as `forward` took and gave."""
    check_device(logits_TV)
    rows, vocabulary = logits_TV.shape
    launch(
        backward_kernel, rows, logits_TV, logits_TV.stride(0), vocabulary, labels_T.contiguous(), temperature.contiguous(),
        int(temperature.numel() > 1), logprob_T.contiguous(), saved_3T, rows, d_logprob_T.contiguous(), d_entropy_T.contiguous(),
        d_logits_TV, d_logits_TV.stride(0), device=logits_TV.device, **(shape or tile_shape(logits_TV.dtype)),
    )  # fmt: skip


def narrowed(logits_TV: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """[T, vocabulary] of `dtype` in the upper half of each row's own memory; the logits themselves where the dtype is theirs.

    logits_TV: [T, columns] contiguous fp32, columns ≥ vocabulary and a multiple of 8.
    """
    if dtype == logits_TV.dtype:
        return logits_TV[:, :vocabulary]
    columns = logits_TV.shape[1]
    return logits_TV.view(dtype)[:, columns : columns + vocabulary]
