"""Sampler against trainer: the figures are numpy's, add up over ranks and hide nothing. The alarm's course: test_alarms.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.mismatch import (
    BINS,
    Bounds,
    Mismatch,
    MismatchSums,
    alarm_text,
    bounded,
    bounds_of,
    mismatch_row,
    percentile,
    tis_weights,
)

INF, NAN = float("inf"), float("nan")
CPU = torch.device("cpu")
BOUND = 1e-3


def measured(*micro: tuple, bound: float = BOUND) -> Mismatch:
    """Of one mini-batch on one rank; each micro-batch (recomputed, sampled) or with which tokens are fresh."""
    sums, tokens = MismatchSums(bound, CPU), 0
    for recomputed, sampled, *fresh in micro:
        fresh_R = torch.tensor(fresh[0] if fresh else [True] * len(recomputed), dtype=torch.bool)
        sums.add(torch.tensor(recomputed, dtype=torch.float32), torch.tensor(sampled, dtype=torch.float32), fresh_R)
        tokens += int(fresh_R.sum())
    return sums.result(tokens)


def gaps_of_all_sizes(count: int, seed: int) -> np.ndarray:
    """From 1e-9 to 300 nats, some of them 0, of both signs."""
    random = np.random.default_rng(seed)
    gaps = 10.0 ** random.uniform(-9, 2.5, count) * random.choice([-1, 1], count)
    return np.where(random.random(count) < 0.1, 0.0, gaps).astype(np.float32)


@given(st.integers(0, 2**31), st.integers(1, 3000))
@settings(max_examples=80, deadline=None)
def test_it_is_numpys(seed, count):
    gaps = gaps_of_all_sizes(count, seed)
    # Sampled at 0, so that the difference of the two fp32 numbers is the gap itself.
    cut = seed % (count + 1)
    row = mismatch_row([measured((gaps[:cut], np.zeros(cut)), (gaps[cut:], np.zeros(count - cut)))])
    exact = gaps.astype(np.float64)
    size = np.abs(exact)
    assert row["mismatch/mean"] == pytest.approx(size.mean(), rel=1e-12)
    assert row["mismatch/max"] == size.max()
    assert row["mismatch/beyond"] == (size > BOUND).mean()
    assert row["mismatch/k3"] == pytest.approx((np.exp(exact) - 1 - exact).mean(), rel=1e-9, abs=1e-15)
    quantile = np.quantile(size, 0.999, method="inverted_cdf")
    assert row["mismatch/p999"] == pytest.approx(quantile, rel=0.005, abs=1e-8)
    assert row["mismatch/p999"] <= row["mismatch/max"]


@given(st.integers(0, 2**31), st.integers(1, 2000), st.integers(1, 1000))
@settings(max_examples=80, deadline=None)
def test_any_percentile_is_numpys_within_half_a_percent(seed, count, thousandths):
    gaps = np.abs(gaps_of_all_sizes(count, seed))
    part = measured((gaps, np.zeros(count)))
    expected = np.quantile(gaps.astype(np.float64), thousandths / 1000, method="inverted_cdf")
    assert percentile(part.histogram, part.largest, thousandths) == pytest.approx(expected, rel=0.005, abs=1e-8)


def test_the_edges_of_the_histogram():
    part = measured(([0.0, 1e-9, 1.0001e-8, 1.0, 999.0, 1001.0, 5e4], [0.0] * 7))
    assert part.histogram.sum() == 7
    assert part.histogram[0] == 2, "0 and what is below 1e-8"
    assert part.histogram[1] == 1
    assert part.histogram[-1] == 1, "what is far above 1e3; the last bin reaches just beyond it"
    assert len(part.histogram) == BINS + 2
    assert percentile(part.histogram, part.largest, 1000) == 5e4
    assert percentile(part.histogram, part.largest, 1) == 0.0


def test_only_fresh_tokens_count():
    part = measured(([-1.0, NAN, -3.0, -INF], [-1.5, -2.0, -3.0, -9.0], [True, False, True, False]))
    assert part.tokens == 2
    assert (part.gap_sum, part.largest, part.beyond) == (0.5, 0.5, 1)
    assert part.histogram.sum() == 2


def test_those_left_out_do_not_lower_a_percentile():
    fresh = measured(([-1.0, -2.0], [-1.5, -2.5]))
    with_others = measured(([-1.0, -2.0, *[-3.0] * 5000], [-1.5, -2.5, *[-3.0] * 5000], [True, True, *[False] * 5000]))
    assert mismatch_row([fresh]) == mismatch_row([with_others])


def test_no_tokens():
    nothing = measured(([], []))
    assert (nothing.tokens, nothing.gap_sum, nothing.largest) == (0, 0.0, 0.0)
    assert mismatch_row([nothing]) == {}
    assert mismatch_row([measured(([-1.0], [-9.0], [False]))]) == {}


@pytest.mark.parametrize(
    ("recomputed", "sampled", "mean", "largest"),
    [(-INF, -1.0, INF, INF), (-1.0, -INF, INF, INF), (NAN, -1.0, NAN, NAN), (-1.0, NAN, NAN, NAN), (-INF, -INF, NAN, NAN)],
)
def test_nothing_that_is_not_finite_is_hidden(recomputed, sampled, mean, largest):
    row = mismatch_row([measured(([recomputed, -1.0], [sampled, -1.0]))])
    same = pytest.approx(mean, nan_ok=True)
    assert row["mismatch/mean"] == same
    assert row["mismatch/max"] == pytest.approx(largest, nan_ok=True)
    assert not math.isfinite(row["mismatch/k3"])
    assert row["mismatch/beyond"] == 0.5
    assert not math.isfinite(row["mismatch/p999"])


def test_a_gap_at_the_bound_is_within_it():
    part = measured(([0.25, 0.2500001, -0.25], [0.0, 0.0, 0.0]), bound=0.25)
    assert part.beyond == 1


@pytest.mark.parametrize("bad", [None, NAN, INF])
def test_ranks_and_mini_batches_add_up(bad):
    """As the actor adds them: sums summed, largest by maximum, over ranks; which may lose a NaN on the way."""
    gaps = gaps_of_all_sizes(999, 5)
    gaps[700] = gaps[700] if bad is None else bad
    shares = np.split(gaps, [200, 650])
    ranks = []
    for share in shares:
        sums = MismatchSums(BOUND, CPU)
        sums.add(torch.from_numpy(share), torch.zeros(len(share)), torch.ones(len(share), dtype=torch.bool))
        ranks.append(sums)
    total = MismatchSums(BOUND, CPU)
    total.sums = torch.stack([sums.sums for sums in ranks]).sum(0)
    total.largest = torch.tensor(np.fmax.reduce([sums.largest.item() for sums in ranks]))
    over_ranks, at_once = mismatch_row([total.result(999)]), mismatch_row([measured((gaps, np.zeros(999)))])
    in_parts = mismatch_row([measured((share, np.zeros(len(share)))) for share in shares])
    for name, value in at_once.items():
        assert over_ranks[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name
        assert in_parts[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


# the alarm


def step(mean: float) -> list[Mismatch]:
    return [measured(([mean] * 4, [0.0] * 4))]


LIMITS = Bounds(token=0.2, mean=0.05)


@pytest.mark.parametrize(("mean", "alarm"), [(0.01, 0), (0.06, 1), (0.5, 1), (NAN, 1), (INF, 1)])
def test_a_mean_beyond_its_bound_or_not_finite_is_an_alarm(mean, alarm):
    row = bounded(mismatch_row(step(mean)), LIMITS)
    assert row["mismatch/alarm"] == alarm
    assert (row["mismatch/mean_bound"], row["mismatch/token_bound"]) == (0.05, 0.2)


def test_a_step_without_fresh_tokens_has_none():
    assert bounded(mismatch_row([measured(([], []))]), LIMITS) == {}


def test_the_alarm_tells_the_figures_also_of_a_row_that_was_read_back():
    row = bounded(mismatch_row(step(0.06)), LIMITS)
    assert "mean |Δ log-probability| 0.06 nats, bound 0.05" in alarm_text(row)
    assert "0.00% of tokens beyond 0.2" in alarm_text(row)
    lost = bounded(mismatch_row(step(NAN)), LIMITS)
    null = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in lost.items()}
    assert alarm_text(lost) == alarm_text(null)
    assert "mean |Δ log-probability| not finite nats" in alarm_text(lost)


def test_bounds_follow_the_precision_unless_they_are_given():
    def config(token=None, mean=None, wire="engine"):
        return SimpleNamespace(mismatch=SimpleNamespace(token_bound=token, mean_bound=mean), engine=SimpleNamespace(wire=wire))

    assert bounds_of(config(), torch.float32) == Bounds(1e-3, 1e-4)
    assert bounds_of(config(), torch.bfloat16) == Bounds(0.2, 0.05)
    assert bounds_of(config(wire="float8"), torch.float32) == Bounds(0.2, 0.05)
    assert bounds_of(config(token=0.7), torch.float32) == Bounds(0.7, 1e-4)
    assert bounds_of(config(mean=0.3, token=0.1), torch.bfloat16) == Bounds(0.1, 0.3)


# truncated importance sampling


def test_tis_weights_by_hand():
    recomputed = torch.tensor([-1.0, -1.0, -2.0, -0.5, -30.0, -INF, -1.0])
    sampled = torch.tensor([-1.0, -2.0, -1.0, -3.0, -1.0, -1.0, -INF])
    expected = [1.0, min(math.e, 2.0), 1 / math.e, 2.0, math.exp(-29), 0.0, 2.0]
    torch.testing.assert_close(tis_weights(recomputed, sampled, 2.0), torch.tensor(expected))


def test_tis_weights_are_constants():
    recomputed = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = tis_weights(recomputed, torch.tensor([-1.5, -2.5], requires_grad=True), 5.0)
    assert not weights.requires_grad


def test_tis_weights_keep_a_nan():
    assert tis_weights(torch.tensor([NAN, -1.0]), torch.tensor([-1.0, -1.0]), 2.0)[0].isnan()
