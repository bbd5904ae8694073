"""Variable-length sequences into micro-batches without padding: a pure function of the lengths, so all ranks plan alike.

Invariants of `pack`:
- every sequence stands in exactly one micro-batch of one rank, whole;
- no micro-batch holds more than `budget` tokens;
- every rank has the same number of micro-batches (FSDP's collectives run in lockstep), none of them empty where there are
  at least as many sequences as places;
- the ranks' costs are balanced greedily: the longest sequence goes to the cheapest place it fits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

ATTENTION_TOKENS = 32768
"""A sequence of n tokens costs n · (1 + n / ATTENTION_TOKENS): at this length attention costs as much as the rest of a layer
(about 6 · hidden size, for hidden 5120)."""

Plan = list[list[list[int]]]
"""plan[rank][micro-batch] = indices of sequences."""


def pack(lengths: Sequence[int], *, ranks: int, budget: int, at_least: int = 1) -> Plan:
    """Distributes sequences over `ranks`, in as few micro-batches (but `at_least`) as the greedy filling finds for the budget.

    lengths: tokens of each sequence, at least 1. budget: tokens of a micro-batch.
    Raises ValueError where one sequence alone exceeds the budget.
    """
    if lengths and max(lengths) > budget:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a micro-batch of {budget}")
    micro_batches = max(at_least, math.ceil(sum(lengths) / (budget * ranks)), 1)
    while (bins := _fill(lengths, ranks * micro_batches, budget)) is None:
        micro_batches += 1
    bins.sort(key=lambda indices: -cost_of(indices, lengths))
    return [[sorted(indices) for indices in rank_bins] for rank_bins in _deal(bins, lengths, ranks)]


def _fill(lengths: Sequence[int], places: int, budget: int) -> list[list[int]] | None:
    """Longest first into the cheapest place with room; None if a sequence finds no room."""
    bins: list[list[int]] = [[] for _ in range(places)]
    heap = [(0.0, place, 0) for place in range(places)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = []
        while heap and heap[0][2] + lengths[index] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, place, tokens = heapq.heappop(heap)
        bins[place].append(index)
        heapq.heappush(heap, (cost + cost_of([index], lengths), place, tokens + lengths[index]))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _deal(bins: list[list[int]], lengths: Sequence[int], ranks: int) -> Plan:
    """Bins, dearest first, to the ranks in rounds: in each round the rank with the least so far takes the dearest."""
    plan: Plan = [[] for _ in range(ranks)]
    spent = [0.0] * ranks
    for start in range(0, len(bins), ranks):
        order = sorted(range(ranks), key=lambda rank: (spent[rank], rank))
        for rank, indices in zip(order, bins[start : start + ranks], strict=True):
            plan[rank].append(indices)
            spent[rank] += cost_of(indices, lengths)
    return plan


def cost_of(indices: Sequence[int], lengths: Sequence[int]) -> float:
    """Of these sequences together, in tokens."""
    return sum(lengths[index] * (1 + lengths[index] / ATTENTION_TOKENS) for index in indices)
