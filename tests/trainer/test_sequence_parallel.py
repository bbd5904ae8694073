"""Which ranks can share sequences, and what of a micro-batch each gets. That it is one rank's result: test_rank_invariance.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout.errors import InputError
from trainer import token_values
from trainer.attention import Attention
from trainer.batch import MiniBatch, TokenSequence, collate, micro_batches
from trainer.sequence_parallel import SequenceGroup, check_heads, sequence_group

CPU = torch.device("cpu")


def sequence(first: int, prompt: int, response: int) -> TokenSequence:
    """Tokens count up from `first`; its log-probabilities are minus its tokens."""
    ids = np.arange(first, first + prompt + response, dtype=np.int32)
    return TokenSequence(ids[:prompt], ids[prompt:], -ids[prompt:].astype(np.float32), advantage=float(first), weight=0.5)


def shares(sequences, size: int) -> list:
    return [collate(sequences, CPU, Attention(group=SequenceGroup(rank, size, None))) for rank in range(size)]


def test_shares_of_a_micro_batch_by_hand():
    """Three prompt and four response tokens, then two and two: 11 tokens, filled up to 12, six for each of two ranks."""
    first, second = shares([sequence(10, 3, 4), sequence(50, 2, 2)], 2)
    assert first.input_ids_T.tolist() == [10, 11, 12, 13, 14, 15]
    assert second.input_ids_T.tolist() == [16, 50, 51, 52, 53, 0]
    assert first.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert second.position_ids_T.tolist() == [6, 0, 1, 2, 3, 0]
    # Rows predict the next token: that of 13 is 12's place, that of 16 is 15's, which is the first rank's.
    assert first.rows_R.tolist() == [2, 3, 4, 5]
    assert first.labels_R.tolist() == [13, 14, 15, 16]
    assert second.rows_R.tolist() == [2, 3]
    assert second.labels_R.tolist() == [52, 53]
    assert second.sampled_logprob_R.tolist() == [-52, -53]
    assert second.advantage_R.tolist() == [50, 50]
    for share in (first, second):
        assert share.layout.lengths == (7, 4, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_are_the_whole(size):
    sequences = [sequence(10, 3, 4), sequence(50, 2, 9), sequence(90, 1, 1)]
    whole = collate(sequences, CPU)
    parts = shares(sequences, size)
    assert len({len(part.input_ids_T) for part in parts}) == 1
    for name in ("labels_R", "advantage_R", "weight_R", "sampled_logprob_R", "fresh_R"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    each = len(parts[0].input_ids_T)
    assert torch.equal(torch.cat([part.rows_R + rank * each for rank, part in enumerate(parts)]), whole.rows_R)
    assert torch.equal(torch.cat([part.input_ids_T for part in parts])[:20], whole.input_ids_T)


def test_micro_batches_of_groups():
    """Four ranks, two and two: neighbours have the same sequences, and a micro-batch has twice the budget."""
    batch = MiniBatch(tuple(sequence(100 * index, 4, 8) for index in range(4)))
    plans = [
        micro_batches(
            batch,
            rank=rank,
            ranks=4,
            budget=12,
            at_least=1,
            device=CPU,
            attention=Attention(group=SequenceGroup(rank % 2, 2, None)),
        )
        for rank in range(4)
    ]
    assert [[micro.indices for micro in plan] for plan in plans] == [[(0, 2)]] * 2 + [[(1, 3)]] * 2
    assert all(len(micro.input_ids_T) == 12 for plan in plans for micro in plan)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_values_of_shares_come_together_by_sequence(size):
    """Two micro-batches and an empty place, of which one sequence is not wanted."""
    sequences = [sequence(10, 3, 4), sequence(50, 2, 9), sequence(90, 1, 1)]
    parts = [MiniBatch(tuple(sequences))] * 3
    ranks = []
    for rank in range(size):
        attention = Attention(group=SequenceGroup(rank, size, None)) if size > 1 else Attention()
        places = [(2, 0), (1,), ()]
        micro = [collate([sequences[index] for index in indices], CPU, attention, indices) for indices in places]
        ranks.append(SimpleNamespace(micro=micro, parts=parts))
    sampled = {token_values.key_of(each.prompt, each.response): each.sampled_logprobs.tolist() for each in sequences}
    for wanted in (None, list(sampled)[:2]):
        found = [token_values.shares(rank, lambda micro: micro.sampled_logprob_R, wanted) for rank in ranks]
        got = {key: values.tolist() for key, values in token_values.joined(found, size).items()}
        assert got == {key: sampled[key] for key in wanted or sampled}


def test_groups_of_ranks_each_give_their_own():
    one, other = [(b"a", np.array([1.0])), (b"b", np.array([]))], [(b"a", np.array([2.0])), (b"b", np.array([3.0]))]
    alone = [(b"c", np.array([4.0]))]
    found = token_values.joined([one, other, alone, [(b"c", np.array([]))]], together=2)
    assert {key: values.tolist() for key, values in found.items()} == {b"a": [1, 2], b"b": [3], b"c": [4]}
    assert {key: values.tolist() for key, values in token_values.joined([[], alone], together=1).items()} == {b"c": [4]}


def test_nothing_to_share():
    """A place without sequences: a token for each rank, of which none counts."""
    for share in shares([], 3):
        assert share.input_ids_T.tolist() == [0]
        assert share.rows_R.tolist() == share.labels_R.tolist() == []
        assert share.layout.lengths == (3,)
        assert share.counts == ()


@pytest.mark.parametrize(
    ("size", "heads", "key_value_heads"), [(2, 4, 2), (4, 4, 2), (4, 40, 8), (8, 40, 8), (2, 12, 2), (1, 7, 7)]
)
def test_heads_that_can_be_shares(size, heads, key_value_heads):
    check_heads(size, heads, key_value_heads)


@pytest.mark.parametrize(("size", "heads", "key_value_heads"), [(3, 40, 8), (16, 40, 8), (4, 12, 6), (8, 28, 4)])
def test_heads_that_cannot(size, heads, key_value_heads):
    with pytest.raises(InputError, match=rf"parallel\.sequence_ranks: {size} ranks cannot share {heads} heads"):
        check_heads(size, heads, key_value_heads)


def test_ranks_that_cannot_be_grouped(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 6)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(InputError, match=r"parallel\.sequence_ranks: 4 does not divide the 6 ranks"):
        sequence_group(4, 10)
    assert sequence_group(1, 10) is None
