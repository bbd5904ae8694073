"""Finds a model that loops: one stretch of tokens repeated back to back, or phrases that keep coming back.

Two measures of a token sequence x of length n, both exact:
- The longest tandem repeat. For a period p, a maximal run of L ≥ 1 positions i with x[i] = x[i + p] makes a stretch that
  covers L + p tokens and holds (L + p) // p full periods. Of all stretches with at least `min_count` full periods the one that
  covers most tokens is reported; of equals the one with the smaller period, then the earlier start.
- The share of repeated n-grams: of the n - ngram + 1 n-grams, those that equal one starting earlier.

Natively (csrc/cpu/repetition.cpp) 32K tokens take milliseconds, which a test bounds; else NumPy does it, period by period.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.backend import has_native


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


def is_repetitive(repetition: Repetition, total: int, *, min_covered: int, min_count: int, max_ngram_share: float) -> str | None:
    """Why an output of `total` tokens counts as repetitive, in words and with the place; None where it does not.

    It does where a tandem repeat covers at least min_covered tokens in at least min_count full periods (at least the
    min_count it was measured with), or where more than max_ngram_share of its n-grams were there before.
    """
    if repetition.covered >= max(min_covered, 1) and repetition.count >= min_count:
        place = f"tokens {repetition.start}–{repetition.start + repetition.covered - 1} of {total}"
        return f"{place} are a stretch of {repetition.period} repeated {repetition.count} times"
    if repetition.ngram_share > max_ngram_share:
        return (
            f"{repetition.ngram_share:.0%} of the n-grams of {total} tokens occurred before (at most {max_ngram_share:.0%} may)"
        )
    return None


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
