"""The estimators against sums done by hand or by brute force."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from rollout.evaluate.benchmarks import Benchmark
from rollout.evaluate.record import Outcome
from rollout.evaluate.report import figures, seconds_of
from rollout.evaluate.statistics import bootstrap_interval, k_by_rule, pass_at_k, powers_up_to
from rollout.types import Prompt


@pytest.mark.parametrize(("questions", "own", "k"), [
    (500, 64, 64), (30, 64, 64), (1319, None, 2), (1098, None, 2), (599, None, 3), (40, None, 50), (2000, None, 1),
    (7473, None, 1),
])  # fmt: skip
def test_k_is_the_papers(questions, own, k):
    assert k_by_rule(questions, own) == k


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5))


def test_pass_at_k_stays_exact_where_binomials_overflow_a_float():
    exact = 1 - math.comb(19990, 500) / math.comb(20000, 500)  # Python's integers
    assert pass_at_k(20000, 10, 500) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_it_cannot_mean(n, right, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, right, k)


def test_interval_of_two_questions_by_hand():
    # Means of resamples of (0, 1): 0, 1/2, 1 with weights 1/4, 1/2, 1/4. So at 95 % all of it, and at 40 % (30 to 70) the middle.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)


def test_interval_is_that_of_all_resamples():
    values = [0.0, 0.25, 1.0, 0.75]
    means = sorted(np.mean(drawn) for drawn in itertools.product(values, repeat=4))  # 256, equally likely
    low, high = bootstrap_interval(values, level=0.8, resamples=200_000)
    assert low == pytest.approx(means[25], abs=1e-9)
    assert high == pytest.approx(means[230], abs=1e-9)


def test_interval_narrows_as_one_over_the_root_of_the_questions():
    random = np.random.default_rng(0)
    few, many = random.random(50), random.random(800)
    width = [high - low for low, high in map(bootstrap_interval, (few, many))]
    assert width[0] == pytest.approx(2 * 1.96 * few.std() / math.sqrt(50), rel=0.1)
    assert width[1] == pytest.approx(2 * 1.96 * many.std() / math.sqrt(800), rel=0.1)


def test_interval_is_the_same_each_time_and_another_for_another_seed():
    values = np.random.default_rng(1).random(1319)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)


def test_the_curve_has_powers_of_two_and_its_end():
    assert powers_up_to(64) == [1, 2, 4, 8, 16, 32, 64]
    assert powers_up_to(6) == [1, 2, 4, 6]
    assert powers_up_to(0) == []


def outcome(question, sample, right, **changes):
    reason = {True: "right", False: "wrong", None: "unjudged"}[right]
    plain = Outcome(question, sample, right, bool(right), reason, repetitive=False, mixed=False, tokens=10, session=0, at=1.0)
    return replace(plain, **changes)


def benchmark(questions, k):
    prompts = tuple(Prompt(f"b-{number}", "?", "1") for number in range(questions))
    return Benchmark("b", "B", prompts, size=9, k=k, digest="")


def test_figures_by_hand():
    outcomes = [
        outcome(0, 0, True), outcome(0, 1, True, rewarded=False, reason="format", tokens=30),
        outcome(1, 0, False, reason="truncated", tokens=100, repetitive=True, at=5.0), outcome(1, 1, True, mixed=True),
        outcome(2, 0, False, session=1, at=2.0), outcome(2, 1, False, session=1, at=3.0),
    ]  # fmt: skip
    made = figures(benchmark(3, 2), outcomes, seed=0)
    assert made["pass@1"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert made["pass@k"] == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}
    assert made["rewarded"] == pytest.approx(2 / 6)
    assert (made["truncated"], made["format_failures"], made["repetitive"]) == (1 / 6, 1 / 6, 1 / 6)
    assert made["mixed_languages"] == 1 / 6
    assert (made["mean_length"], made["longest"], made["tokens"]) == (170 / 6, 100, 170)
    assert (made["seconds"], made["tokens_per_second"], made["sessions"]) == (8.0, 21.2, 2)
    assert (made["questions"], made["questions_in_the_set"], made["outputs"], made["unjudged"]) == (3, 9, 6, 0)


def test_unjudged_outputs_are_neither_right_nor_wrong():
    outcomes = [
        outcome(0, 0, True), outcome(0, 1, None), outcome(1, 0, None), outcome(1, 1, None), outcome(2, 0, False),
        outcome(2, 1, True),
    ]  # fmt: skip
    made = figures(benchmark(3, 2), outcomes, seed=0)
    assert made["unjudged"] == 3
    assert made["pass@1"] == pytest.approx((1 + 1 / 2) / 2), "question 1 has no verdict and does not count"
    assert made["pass@k"] == {"1": pytest.approx(0.75), "2": 1.0}, "only question 2 has two verdicts"
    assert made["rewarded"] == pytest.approx(2 / 3)


def test_nothing_judged_has_no_score():
    made = figures(benchmark(1, 1), [outcome(0, 0, None)], seed=0)
    assert (made["pass@1"], made["interval_95"], made["pass@k"], made["rewarded"]) == (None, None, {}, None)


def test_seconds_are_summed_over_sessions():
    assert seconds_of([outcome(0, 0, True, at=4.0), outcome(0, 1, True, at=2.0), outcome(1, 0, True, session=2, at=1.5)]) == 5.5
