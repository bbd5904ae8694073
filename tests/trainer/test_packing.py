"""The invariants that `trainer.packing` states, over lengths that hypothesis makes up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.packing import ATTENTION_TOKENS, pack

LENGTHS = st.lists(st.integers(1, 400), max_size=60)


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
