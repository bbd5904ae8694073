"""How far the sampler's log-probabilities lie from the trainer's: measured each step, bounded, and on request corrected.

With d = logprob recomputed - logprob sampled, over the tokens that the scoring weights themselves sampled (a recovered response
is one policy step old and differs by what was learned since), on all ranks and in all mini-batches of a step:

    mismatch/mean, max, p999   mean, maximum and 99.9th percentile of |d|, nats
    mismatch/k3                mean of exp(d) - 1 - d: the k3 estimate of KL(sampler ‖ trainer), as the tokens are the sampler's
                               (J. Schulman, "Approximating KL divergence": samples of q, r = p/q, (r - 1) - log r → KL(q ‖ p))
    mismatch/beyond            share of tokens with |d| above the token bound

The percentile is read off a histogram of log |d|, which ranks and mini-batches can add up: bins of 1 % each, so the geometric
middle of a bin is within 0.5 % of every value in it, from 1e-8 (below it: 0) to 1e3 (above it: the maximum).

A log-probability of -inf or NaN counts as beyond, and mean, k3 and maximum become infinite or NaN: nothing is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.reference import k3
from trainer.config import RunConfig

LOW, HIGH, RATIO = 1e-8, 1e3, 1.01
BINS = math.ceil(math.log(HIGH / LOW) / math.log(RATIO))
"""Between LOW and HIGH; one bin more below, and one above for what is larger or not finite."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Nats. token: of one token's |d|; mean: of their mean over a step, whose crossing is an alarm (`trainer.alarms`)."""

    token: float
    mean: float


def bounds_of(config: RunConfig, precision: torch.dtype) -> Bounds:
    """The configured bounds, else those of the precision in which engine and policy compute. The paper is silent; these are ours:
    in fp32 only the order of sums differs, in bfloat16 or with weights sent as float8 every matrix product is rounded."""
    exact = precision is torch.float32 and config.engine.wire == "engine"
    usual = Bounds(token=1e-3, mean=1e-4) if exact else Bounds(token=0.2, mean=0.05)
    return Bounds(config.mismatch.token_bound or usual.token, config.mismatch.mean_bound or usual.mean)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Of one mini-batch's fresh tokens, over all ranks."""

    tokens: int
    gap_sum: float
    """Sum of |d|."""
    k3_sum: float
    beyond: int
    largest: float
    """NaN where any d is NaN; 0 without tokens."""
    histogram: np.ndarray
    """int64 [BINS + 2] tokens by log |d|."""


class MismatchSums:
    """Gathers one mini-batch's `Mismatch` on one rank, on its device and without waiting for it.

    Over ranks `sums` (fp64 [3 + BINS + 2]) is to be summed, exactly where it counts, and of `largest` the maximum to be taken.
    """

    def __init__(self, token_bound: float, device: torch.device) -> None:
        self._bound = token_bound
        self.sums = torch.zeros(3 + BINS + 2, dtype=torch.float64, device=device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, recomputed_R: Tensor, sampled_R: Tensor, fresh_R: Tensor) -> None:
        """A micro-batch: log-probabilities [R] and which tokens count."""
        if not len(fresh_R):
            return
        d_R = torch.where(fresh_R, recomputed_R.double() - sampled_R.double(), 0)
        gap_R = d_R.abs()
        beyond_R = ~((gap_R <= self._bound) & gap_R.isfinite())
        self.sums[:3] += torch.stack([gap_R.sum(), k3(d_R).sum(), beyond_R.sum()])
        place_R = (gap_R / LOW).log().div(math.log(RATIO)).nan_to_num(nan=BINS).clamp(-1, BINS).floor().long() + 1
        self.sums[3:].index_add_(0, place_R, fresh_R.double())
        self.largest = torch.maximum(self.largest, gap_R.max())

    def result(self, tokens: int) -> Mismatch:
        """Of the sums over all ranks. tokens: fresh ones of the mini-batch."""
        gap_sum, k3_sum, beyond = self.sums[:3].tolist()
        # A maximum over ranks may lose a NaN, a sum does not; and only a NaN makes this sum one.
        largest = gap_sum if math.isnan(gap_sum) else self.largest.item()
        return Mismatch(tokens, gap_sum, k3_sum, int(beyond), largest, self.sums[3:].cpu().numpy().astype(np.int64))


def percentile(histogram: np.ndarray, largest: float, thousandths: int = 999) -> float:
    """The least value that so many thousandths of the tokens do not exceed, within 0.5 %: numpy's "inverted_cdf" quantile.

    histogram: as in `Mismatch`, of at least one token; largest: their maximum, which the result never exceeds.
    """
    rank = -(-thousandths * int(histogram.sum()) // 1000)
    place = int(np.searchsorted(np.cumsum(histogram), max(rank, 1)))
    if place == 0:
        return 0.0
    return largest if place > BINS else min(LOW * RATIO ** (place - 0.5), largest)


def mismatch_row(parts: Sequence[Mismatch]) -> dict[str, float]:
    """A step's metrics from its mini-batches; nothing where the whole batch was recovered."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return {}
    largest = float(np.max([part.largest for part in parts]))
    return {
        "mismatch/mean": sum(part.gap_sum for part in parts) / tokens,
        "mismatch/p999": percentile(sum(part.histogram for part in parts), largest),
        "mismatch/max": largest,
        "mismatch/k3": sum(part.k3_sum for part in parts) / tokens,
        "mismatch/beyond": sum(part.beyond for part in parts) / tokens,
    }


def bounded(row: dict[str, float], bounds: Bounds) -> dict[str, float]:
    """A step's `mismatch_row` with its bounds and `mismatch/alarm`: 1 where the mean exceeds its bound or is not finite. Nothing
    for a step without fresh tokens. `trainer.alarms` tells a person."""
    if not row:
        return {}
    limits = {"mismatch/mean_bound": bounds.mean, "mismatch/token_bound": bounds.token}
    return row | limits | {"mismatch/alarm": int(not row["mismatch/mean"] <= bounds.mean)}


def alarm_text(row: dict[str, float]) -> str:
    """Of a metrics row, in which what is not finite may have become null."""
    shown = {name: row.get(f"mismatch/{name}") for name in ("mean", "p999", "max", "k3", "beyond", "mean_bound", "token_bound")}
    mean, p999, largest, k3_mean = ("not finite" if _lost(shown[n]) else f"{shown[n]:.3g}" for n in ("mean", "p999", "max", "k3"))
    return (
        f"sampler and trainer disagree: mean |Δ log-probability| {mean} nats, bound {shown['mean_bound']:.3g} (p99.9 {p999}, max "
        f"{largest}, k3 {k3_mean}, {shown['beyond']:.2%} of tokens beyond {shown['token_bound']:.3g})"
    )


def calm_text(row: dict[str, float]) -> str:
    return f"mean |Δ log-probability| {row['mismatch/mean']:.3g} nats, bound {row['mismatch/mean_bound']:.3g}"


def _lost(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def tis_weights(recomputed_R: Tensor, sampled_R: Tensor, cap: float) -> Tensor:
    """Truncated importance weights: min(π_trainer / π_sampler, cap) of each token, both of them constants to the gradient.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training". Advantages are multiplied
    by them: max(-r A, -clip(r) A) · w = max(-r (A w), -clip(r) (A w)) for w ≥ 0, so the policy term takes them and no other does.
    """
    return (recomputed_R - sampled_R).detach().exp().clamp(max=cap)
