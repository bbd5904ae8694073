"""The estimators, as pure functions of how many of each question's outputs are right.

For a question with n judged outputs, c of them right:

    pass@1 = c / n                                       the mean correctness over k sampled outputs, as in the paper
    pass@k = 1 - C(n - c, k) / C(n, k)                   without bias (Chen et al. 2021, arXiv 2107.03374), k ≤ n
           = 1 - ∏_{i = n - c + 1}^{n} (1 - k / i)       the same without large binomials

Of a benchmark: the mean over its questions. Its confidence interval is the percentile bootstrap over questions: the k outputs of
one question are not independent draws of the benchmark, so what is resampled is the question with all its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAPER_OUTPUTS = 2000
"""k · questions, about, where the paper gives no k of its own."""
RESAMPLES = 10_000
_CHUNK = 1 << 22
"""Draws held at once."""


def k_by_rule(questions: int, own: int | None) -> int:
    """The paper's k: `own` (64 for MATH-500 and AIME), else about 2000 / questions; at least 1. questions: of the whole set."""
    return own if own is not None else max(1, round(PAPER_OUTPUTS / questions))


def pass_at_k(n: int, right: int, k: int) -> float:
    """0 ≤ right ≤ n, 1 ≤ k ≤ n. Raises ValueError otherwise."""
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass@{k} of {right} right among {n}")
    if n - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap's interval for the mean of `values` [n], n ≥ 1. Same arguments, same interval: the draws are
    Philox's, whose streams NumPy keeps."""
    array = np.asarray(values, dtype=np.float64)
    bits = np.random.Philox(np.random.SeedSequence(seed))
    means = []
    step = max(1, _CHUNK // len(array))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        # The top 53 bits as a fraction in [0, 1): n is far below where the remainder of a modulus would show.
        drawn = ((bits.random_raw(count * len(array)) >> np.uint64(11)) * 2.0**-53 * len(array)).astype(np.int64)
        means.append(array[drawn].reshape(count, len(array)).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, … and n itself: the k of a pass@k curve."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n}) if n >= 1 else []
