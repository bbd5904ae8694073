"""The repetition measures against their definition, by brute force, for the native code and the NumPy one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.backend import has_native
from rollout.reward import repetition as module
from rollout.reward.repetition import Repetition, is_repetitive, measure_repetition

IMPLEMENTATIONS = [
    pytest.param(
        module._measure_native,
        marks=pytest.mark.skipif(not has_native(), reason="kernels._native is not built"),
        id="native",
    ),
    pytest.param(module._measure_numpy, id="numpy"),
]


def brute_force(tokens: list[int], ngram: int, min_count: int) -> tuple[int, int, int, float]:
    n = len(tokens)
    best = (0, 0, 0)
    for period in range(1, n):
        i = 0
        while i + period < n:
            run = 0
            while i + run + period < n and tokens[i + run] == tokens[i + run + period]:
                run += 1
            if run and (run + period) // period >= min_count and run + period > best[1]:
                best = (i, run + period, period)
            i += run + 1
    grams = [tuple(tokens[i : i + ngram]) for i in range(n - ngram + 1)]
    share = (len(grams) - len(set(grams))) / len(grams) if grams else 0.0
    return (*best, share)


@st.composite
def looping_tokens(draw: st.DrawFn) -> list[int]:
    """Blocks over a small alphabet, some of them repeated: random tokens alone would hardly ever loop."""
    block = st.lists(st.integers(0, draw(st.integers(0, 3))), max_size=12)
    return [
        token for tokens, times in draw(st.lists(st.tuples(block, st.integers(1, 9)), max_size=6)) for token in tokens * times
    ]


@pytest.mark.parametrize("measure", IMPLEMENTATIONS)
@settings(max_examples=300, deadline=None)
@given(tokens=looping_tokens(), ngram=st.integers(1, 20), min_count=st.integers(2, 5), wide=st.booleans())
@example(tokens=[], ngram=1, min_count=2, wide=False)
@example(tokens=[7], ngram=1, min_count=2, wide=False)
@example(tokens=[1, 1, 1, 0, 2, 2, 2], ngram=1, min_count=3, wide=True)  # equal stretches: the earlier
@example(tokens=[1, 2] * 3 + [0] + [3] * 6, ngram=2, min_count=3, wide=True)  # equal stretches: the smaller period
def test_agrees_with_the_definition(measure, tokens, ngram, min_count, wide):
    token_ids = np.array(tokens, dtype=np.int64 if wide else np.int32) * (2**40 if wide else 1)
    assert measure(token_ids, ngram, min_count) == pytest.approx(brute_force(tokens, ngram, min_count), abs=1e-12)


@pytest.mark.parametrize("measure", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_long_runs_agree_with_the_definition(measure, data):
    """Stretches longer than the search compares directly, among others with nearly the same period."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        period = data.draw(st.integers(1, 60))
        parts += [
            rng.integers(0, 3, data.draw(st.integers(0, 40))),
            np.tile(rng.integers(0, 2, period), data.draw(st.integers(1, 12))),
        ]
    tokens = np.concatenate(parts).astype(np.int32)
    assert measure(tokens, 16, 3) == pytest.approx(brute_force(tokens.tolist(), 16, 3), abs=1e-12)


@pytest.mark.parametrize("measure", IMPLEMENTATIONS)
def test_thue_morse_defeats_no_hash(measure):
    """Thue–Morse words collide under polynomial hashes modulo 2^64, and hold no stretch of three periods: a search that trusted
    its hashes would find one."""
    word = np.array([bin(i).count("1") % 2 for i in range(4096)], dtype=np.int32)
    assert measure(word, 16, 3)[:3] == (0, 0, 0)
    halves = [word[:2048], 1 - word[:2048], word[:2048]]
    assert measure(np.concatenate(halves), 2048, 2)[3] == pytest.approx(1 / 4097)


@pytest.mark.skipif(not has_native(), reason="kernels._native is not built")
@pytest.mark.parametrize("kind", ["text", "loop", "constant", "halves", "fibonacci", "binary"])
def test_32k_tokens_take_little_time(kind):
    n = 32768
    rng = np.random.default_rng(0)
    fibonacci = [[0], [0, 1]]
    while len(fibonacci[-1]) < n:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    tokens = {
        "text": (rng.zipf(1.3, n) % 150000),
        "loop": np.concatenate([rng.integers(0, 150000, n // 2), np.tile(rng.integers(0, 150000, 100), n)])[:n],
        "constant": np.zeros(n),
        "halves": np.repeat([0, 1], n // 2),
        "fibonacci": np.array(fibonacci[-1][:n]),
        "binary": rng.integers(0, 2, n),
    }[kind].astype(np.int32)
    durations = []
    for _ in range(7):
        start = time.perf_counter()
        measure_repetition(tokens)
        durations.append(time.perf_counter() - start)
    # 2 ms is the aim on an idle core; the bound leaves room for a busy machine and still catches a quadratic search.
    assert min(durations) < 20e-3, f"{min(durations) * 1e3:.2f} ms"


def test_measure_fills_the_dataclass_and_refuses_bad_input():
    tokens = np.array([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 7], dtype=np.int32)
    found = measure_repetition(tokens, 3)
    assert found == Repetition(start=2, covered=10, period=3, count=3, ngram_share=pytest.approx(5 / 11))
    read_only = tokens.copy()
    read_only.setflags(write=False)
    assert measure_repetition(read_only, 3) == found
    assert measure_repetition(np.repeat(tokens, 2)[::2], 3) == found
    for bad in (tokens.astype(np.float32), tokens.reshape(1, -1)):
        with pytest.raises(ValueError, match="token_ids"):
            measure_repetition(bad, 3)
    with pytest.raises(ValueError, match="ngram"):
        measure_repetition(tokens, 0)
    with pytest.raises(ValueError, match="min_count"):
        measure_repetition(tokens, 3, min_count=1)


def test_is_repetitive_gives_the_reason_and_the_place():
    limits = {"min_covered": 100, "min_count": 5, "max_ngram_share": 0.5}
    assert is_repetitive(Repetition(0, 0, 0, 0, 0.0), 0, **limits) is None
    assert is_repetitive(Repetition(10, 99, 3, 33, 0.5), 400, **limits) is None
    assert is_repetitive(Repetition(10, 120, 30, 4, 0.5), 400, **limits) is None
    assert (
        is_repetitive(Repetition(10, 150, 30, 5, 0.9), 400, **limits)
        == "tokens 10–159 of 400 are a stretch of 30 repeated 5 times"
    )
    reason = is_repetitive(Repetition(10, 99, 3, 33, 0.51), 400, **limits)
    assert reason == "51% of the n-grams of 400 tokens occurred before (at most 50% may)"
