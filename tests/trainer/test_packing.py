"""The invariants that `trainer.packing` states, over lengths that hypothesis makes up, and how full and even its plans are over
lengths of real outputs."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reward_traces import parts, qwen_tokenizer
from trainer.packing import ATTENTION_TOKENS, pack

LENGTHS = st.lists(st.integers(1, 400), max_size=60)
CONTEXT = 16384
DATA = Path(__file__).parents[2] / os.environ.get("KEJU_TEST_DATA", "../shared/data")
KINDS = ("traces", "long traces", "uniform to 16K")


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
def real_lengths(tmp_path_factory) -> np.ndarray:
    """Tokens of every recorded output of a reasoning model, without its prompt, at most CONTEXT."""
    if not (DATA / "traces_skythought").is_dir():
        pytest.skip(f"no test data at {DATA} (set KEJU_TEST_DATA)")
    tokenizer = qwen_tokenizer(DATA, tmp_path_factory.mktemp("tokenizer"))
    encoded = tokenizer([part.text for part in parts(DATA)], add_special_tokens=False)["input_ids"]
    return np.asarray([min(len(ids), CONTEXT) for ids in encoded if ids])


@pytest.mark.parametrize(
    ("kind", "ranks"), [(kind, ranks) for kind in KINDS for ranks in (2, 8, 32) if (kind, ranks) != ("traces", 32)]
)
def test_a_step_fills_its_budget_and_its_ranks_evenly(real_lengths, kind, ranks):
    """256 groups of 16 outputs: at least 97 % of the micro-batches' tokens are used, or one micro-batch less would not hold them.
    The dearest rank costs less than 5 % more than the mean, and so do the dearest of all rounds together, for whom the rest wait.

    Not "traces" on 32 ranks: two micro-batches each, half of them tiny outputs and a dozen of 16K, which no plan evens out.
    """
    generator = np.random.default_rng(5)
    choice = {
        "traces": real_lengths,
        "long traces": real_lengths[real_lengths >= 1000],
        "uniform to 16K": np.arange(200, CONTEXT + 1),
    }
    lengths = generator.choice(choice[kind], 256 * 16).tolist()
    plan = pack(lengths, ranks=ranks, budget=CONTEXT)
    assert sorted(index for rank_bins in plan for indices in rank_bins for index in indices) == list(range(len(lengths)))
    micro_batches = len(plan[0])
    used = sum(lengths) / (micro_batches * ranks * CONTEXT)
    assert used >= 0.97 or micro_batches == math.ceil(sum(lengths) / (ranks * CONTEXT))
    if ranks == 8:
        assert used >= 0.97
    costs = np.array([[cost(indices, lengths) for indices in rank_bins] for rank_bins in plan])
    assert costs.sum(1).max() < 1.05 * costs.sum(1).mean()
    assert costs.max(0).sum() < 1.05 * costs.sum(1).mean()
