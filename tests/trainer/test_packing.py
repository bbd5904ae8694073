"""The invariants that `trainer.packing` states, over lengths that hypothesis makes up, and how full and even its plans are over
lengths of real outputs."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import KINDS, Filling, drawn, real_lengths
from trainer.packing import ATTENTION_TOKENS, pack

LENGTHS = st.lists(st.integers(1, 400), max_size=60)
CONTEXT = 16384
DATA = Path(__file__).parents[2] / os.environ.get("KEJU_TEST_DATA", "../shared/data")


def cost(indices, lengths) -> float:
    return sum(lengths[index] * (1 + lengths[index] / ATTENTION_TOKENS) for index in indices)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(400, 3000), st.integers(1, 6))
def test_invariants(lengths, ranks, budget, at_least):
    plan = pack(lengths, ranks=ranks, budget=budget, at_least=at_least)
    bins = [indices for rank_bins in plan for indices in rank_bins]
    assert len(plan) == ranks
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths))), "each sequence once"
    assert all(sum(lengths[index] for index in indices) <= budget for indices in bins)
    assert len({len(rank_bins) for rank_bins in plan}) == 1, "every rank has as many micro-batches as the others"
    assert len(plan[0]) >= at_least
    if len(lengths) >= len(bins):
        assert all(bins), "no micro-batch is empty while there are sequences enough"
    else:
        assert all(len(indices) <= 1 for indices in bins), "an empty place beside two sequences in one"
    assert all(indices == sorted(indices) for indices in bins), "a micro-batch keeps the order of the mini-batch"
    assert pack(list(lengths), ranks=ranks, budget=budget, at_least=at_least) == plan, "every rank makes the same plan"


@settings(max_examples=100, deadline=None)
@given(LENGTHS.filter(bool), st.integers(1, 8), st.integers(1, 6))
def test_balance_where_the_budget_does_not_bind(lengths, ranks, at_least):
    """The dearest place was the cheapest when it took its last sequence. Dealt in rounds, the dearest of a round to the rank with
    the least so far, totals lie no further apart than the places of the most uneven round."""
    plan = pack(lengths, ranks=ranks, budget=10**9, at_least=at_least)
    assert len(plan[0]) == at_least, "no more micro-batches than asked for"
    costs = [[cost(indices, lengths) for indices in rank_bins] for rank_bins in plan]
    places = [value for rank_costs in costs for value in rank_costs]
    longest = cost([lengths.index(max(lengths))], lengths)
    assert max(places) - min(places) <= longest + 1e-6
    totals = [sum(rank_costs) for rank_costs in costs]
    assert max(totals) - min(totals) <= max(max(round) - min(round) for round in zip(*costs, strict=True)) + 1e-6


def test_few_micro_batches():
    # Six of 100 tokens and two of 300 are 1200: on two ranks with a budget of 600 one micro-batch each, and both full.
    plan = pack([100, 300, 100, 100, 300, 100, 100, 100], ranks=2, budget=600)
    assert [[sum([100, 300, 100, 100, 300, 100, 100, 100][i] for i in m) for m in r] for r in plan] == [[600], [600]]


def test_a_sequence_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="401 tokens does not fit a micro-batch of 400"):
        pack([3, 401], ranks=2, budget=400)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    if not (DATA / "traces_skythought").is_dir():
        pytest.skip(f"no test data at {DATA} (set KEJU_TEST_DATA)")
    return real_lengths(DATA, CONTEXT)


@pytest.mark.parametrize(
    ("kind", "ranks"), [(kind, ranks) for kind in KINDS for ranks in (2, 8, 32) if (kind, ranks) != ("traces", 32)]
)
def test_a_step_fills_its_budget_and_its_ranks_evenly(real, kind, ranks):
    """256 groups of 16 outputs: at least 97 % of the micro-batches' tokens are used, or one micro-batch less would not hold them.
    The dearest rank costs less than 5 % more than the mean, and so do the dearest of all rounds together, for whom the rest wait.

    Not "traces" on 32 ranks: two micro-batches each, half of them tiny outputs and a dozen of 16K, which no plan evens out.
    """
    lengths = drawn(kind, real, CONTEXT)
    plan = pack(lengths, ranks=ranks, budget=CONTEXT)
    assert sorted(index for rank_bins in plan for indices in rank_bins for index in indices) == list(range(len(lengths)))
    filling = Filling.of(plan, lengths, CONTEXT)
    assert filling.used >= 0.97 or filling.micro_batches == filling.fewest
    assert filling.used >= 0.97 or ranks != 8
    assert filling.ranks < 0.05
    assert filling.lockstep < 0.05


def test_filling_by_hand():
    # Two ranks, two micro-batches of at most 10 tokens: 6 | 8 and 4 + 2 | nothing. n costs n · (1 + n / 32768).
    cost_of = {n: n * (1 + n / 32768) for n in (8, 6, 4, 2)}
    filling = Filling.of([[[0], [1]], [[2, 3], []]], [6, 8, 4, 2], 10)
    mean = sum(cost_of.values()) / 2
    assert (filling.micro_batches, filling.fewest, filling.used) == (2, 1, 20 / 40)
    assert filling.ranks == pytest.approx((cost_of[6] + cost_of[8]) / mean - 1)
    assert filling.lockstep == pytest.approx((max(cost_of[6], cost_of[4] + cost_of[2]) + cost_of[8]) / mean - 1)
