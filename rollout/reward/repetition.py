"""Finds a model that loops: one stretch of tokens repeated back to back, or phrases that keep coming back.

Two measures of a token sequence x of length n, both exact (`measure_repetition`):
- The longest tandem repeat. For a period p, a maximal run of L ≥ 1 positions i with x[i] = x[i + p] makes a stretch that
  covers L + p tokens and holds (L + p) // p full periods. Of all stretches with at least `min_count` full periods the one that
  covers most tokens is reported; of equals the one with the smaller period, then the earlier start.
- The share of repeated n-grams: of the n - ngram + 1 n-grams, those that equal one starting earlier.

Natively (csrc/cpu/repetition.cpp) 32K tokens take milliseconds, which a test bounds; else NumPy does it, period by period.

A loop that counts ("position 57 is lost …, position 58 is won …"; the same paragraph under a new number) repeats nothing to the
token. So the tandem repeat is looked for a second time with the COUNTERS hidden: each run of numbers and of labels in capital
letters becomes one symbol. Tables and case distinctions look like that too, and end; so of such a stretch many more tokens are
asked for, and only those that are no counters count.

`RepetitionDetector` applies limits to all three; how they were chosen on real outputs is in docs/reward.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kernels.backend import has_native

_COUNTER = re.compile(r"[Ġ▁ ]?(?:[0-9]+|[A-Z]{1,3})")
"""A token that counts: digits, or one to three capital letters. Ġ and ▁ are how vocabularies write a leading blank."""
_HIDDEN = -1


@dataclass(frozen=True, slots=True)
class RepetitionLimits:
    """When a text of n tokens, a thinking or an answer, counts as repeated. The paper names the check and is silent on its
    numbers; these are ours, calibrated on real outputs (docs/reward.md)."""

    ngram: int = 20
    """Tokens in the n-grams whose share is measured."""
    min_covered: float = 0.2
    """A loop must cover at least this part of the text …"""
    min_count: int = 5
    """… and go round at least so often …"""
    min_tokens: int = 64
    """… and be at least so long: an answer of 1000000 is six equal digits, and no loop."""
    min_counting_tokens: int = 640
    """A loop that counts must be at least so long, its numbers and labels not reckoned."""
    max_ngram_share: float = 0.33
    """The most that repeated n-grams may take of all n-grams."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """What `measure_repetition` found. start, covered and period are in tokens; all of them and count are 0 where nothing repeats
    back to back. ngram_share is in [0, 1)."""

    start: int
    covered: int
    period: int
    count: int
    """Full periods: covered // period."""
    ngram_share: float


def measure_repetition(token_ids: np.ndarray, ngram: int = 16, *, min_count: int = 3) -> Repetition:
    """The longest tandem repeat and the share of repeated n-grams (this module's head defines both).

    token_ids: int32 or int64 [n], n ≥ 0. ngram ≥ 1: tokens of an n-gram; a sequence shorter than that has share 0.
    min_count ≥ 2: full periods that make a tandem repeat. Raises ValueError for other arguments.
    """
    if token_ids.ndim != 1 or token_ids.dtype not in (np.int32, np.int64):
        raise ValueError(f"token_ids: expected int32 or int64 [n], got {token_ids.dtype} {list(token_ids.shape)}")
    if ngram < 1 or min_count < 2:
        raise ValueError(f"ngram must be at least 1 and min_count at least 2, got {ngram} and {min_count}")
    measure = _measure_native if has_native() else _measure_numpy
    start, covered, period, ngram_share = measure(token_ids, ngram, min_count)
    return Repetition(start, covered, period, covered // period if period else 0, ngram_share)


class RepetitionDetector:
    """Says of a text's tokens why they are repetitive, and where. Holds the limits and which tokens count; thread-safe."""

    def __init__(self, limits: RepetitionLimits, vocabulary: Mapping[str, int]) -> None:
        """vocabulary: token, as the tokenizer writes it → id (`tokenizer.get_vocab()`)."""
        self._limits, self._counters = limits, counters_of(vocabulary)

    def __call__(self, token_ids: np.ndarray) -> str | None:
        """token_ids: int32 or int64 [n], n ≥ 0. The reason in words, with the place in tokens; None where nothing is wrong."""
        limits, total = self._limits, len(token_ids)
        if total < limits.min_tokens:
            return None
        found = measure_repetition(token_ids, limits.ngram, min_count=limits.min_count)
        if found.covered >= max(limits.min_tokens, math.ceil(limits.min_covered * total)):
            place = f"tokens {found.start}–{found.start + found.covered - 1} of {total}"
            return f"{place} are a stretch of {found.period} repeated {found.count} times"
        if total >= limits.min_counting_tokens and (counting := self._counting(token_ids)) is not None:
            return counting
        if found.ngram_share > limits.max_ngram_share:
            start, stop = longest_repeated_passage(token_ids, limits.ngram)
            return (
                f"{found.ngram_share:.0%} of the {limits.ngram}-grams of {total} tokens occurred before (at most "
                f"{limits.max_ngram_share:.0%} may), the longest passage at tokens {start}–{stop - 1}"
            )
        return None

    def _counting(self, token_ids: np.ndarray) -> str | None:
        """A loop but for its counters."""
        limits = self._limits
        hidden, places = hide_counters(token_ids, self._counters)
        found = measure_repetition(hidden, limits.ngram, min_count=limits.min_count)
        if found.covered < limits.min_covered * len(hidden) or words_in(hidden, found) < limits.min_counting_tokens:
            return None
        stop = found.start + found.covered
        last = (int(places[stop]) if stop < len(places) else len(token_ids)) - 1
        place = f"tokens {places[found.start]}–{last} of {len(token_ids)}"
        return f"{place} are a stretch of {found.period} repeated {found.count} times but for its numbers"


def counters_of(vocabulary: Mapping[str, int]) -> np.ndarray:
    """bool [V]: which ids stand for digits, or for one to three capital letters."""
    counters = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=bool)
    counters[[index for token, index in vocabulary.items() if _COUNTER.fullmatch(token)]] = True
    return counters


def words_in(hidden: np.ndarray, found: Repetition) -> int:
    """Tokens of the stretch that are no counters. hidden: `hide_counters`'s, in which `found` was measured."""
    return int(np.count_nonzero(hidden[found.start : found.start + found.covered] != _HIDDEN))


def hide_counters(token_ids: np.ndarray, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the sequence with each run of counters as one -1, where each of its tokens begins in token_ids).

    counters: bool [V], which ids count; an id beyond V does not.
    """
    counts = counters[np.minimum(token_ids, len(counters) - 1)] & (token_ids < len(counters))
    kept = ~counts
    kept[:1] = True
    kept[1:] |= ~counts[:-1]
    places = np.flatnonzero(kept)
    return np.where(counts, np.asarray(_HIDDEN, token_ids.dtype), token_ids)[places], places


def longest_repeated_passage(token_ids: np.ndarray, ngram: int) -> tuple[int, int]:
    """[start, stop) in tokens of the longest passage whose n-grams all occurred before, of equals the first; (0, 0) for none."""
    total = len(token_ids) - ngram + 1
    if total <= 0:
        return 0, 0
    # Names for the windows of 1, 2, 4, … tokens: two equal names, two equal windows. The last step overlaps.
    names, width = np.unique(token_ids, return_inverse=True)[1], 1
    while width < ngram:
        step = min(width, ngram - width)
        pairs = names[:-step] * (len(names) + 1) + names[step:]
        names, width = np.unique(pairs, return_inverse=True)[1], width + step
    seen = np.ones(total, dtype=bool)
    seen[np.unique(names, return_index=True)[1]] = False
    edges = np.flatnonzero(np.diff(np.concatenate(([0], seen, [0]))))
    if not len(edges):
        return 0, 0
    longest = int((edges[1::2] - edges[::2]).argmax())
    return int(edges[2 * longest]), int(edges[2 * longest + 1]) + ngram - 1


def _measure_native(token_ids: np.ndarray, ngram: int, min_count: int) -> tuple[int, int, int, float]:
    import torch

    # A copy where the array is read-only or strided backward, neither of which torch can share.
    ids = np.require(token_ids, requirements=["C", "W"])
    return torch.ops.keju.repetition(torch.from_numpy(ids), ngram, min_count)


def _measure_numpy(token_ids: np.ndarray, ngram: int, min_count: int) -> tuple[int, int, int, float]:
    start, covered, period = _longest_tandem(token_ids, min_count)
    total = len(token_ids) - ngram + 1
    if total <= 0:
        return start, covered, period, 0.0
    windows = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(token_ids), ngram)
    distinct = len({window.tobytes() for window in windows})
    return start, covered, period, (total - distinct) / total


def _longest_tandem(token_ids: np.ndarray, min_count: int) -> tuple[int, int, int]:
    """(start, covered, period); all periods in turn, each looked at in full only if it may hold a longer stretch."""
    n = len(token_ids)
    best = (0, 0, 0)
    for period in range(1, n // min_count + 1):
        need = max((min_count - 1) * period, best[1] + 1 - period)
        head, tail = token_ids[:-period], token_ids[period:]
        # A run of `need` matches contains a multiple of need.
        if need > len(head) or not (head[need - 1 :: need] == tail[need - 1 :: need]).any():
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([0], head == tail, [0]))))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if len(lengths) and lengths.max() >= need:
            longest = int(lengths.argmax())
            best = (int(starts[longest]), int(lengths[longest]) + period, period)
    return best
