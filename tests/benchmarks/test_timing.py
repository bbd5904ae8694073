"""Fair order, right quantiles, and a budget that bounds the rounds."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from benchmarks.kernels.timing import Timed, interleave, orders, quantile, rounds_for, spread


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_round_has_everyone_once_and_all_stand_equally_often_in_each_place(count):
    names = [f"c{number}" for number in range(count)]
    rounds = list(orders(names, 2 * count))
    assert all(sorted(order) == names for order in rounds)
    for place in range(count):
        assert set(Counter(order[place] for order in rounds).values()) == {2}


def test_nobody_always_follows_the_same_neighbour():
    names = ["a", "b", "c"]
    followed = {(before, after) for order in orders(names, 6) for before, after in itertools.pairwise(order)}
    assert followed == {(x, y) for x in names for y in names if x != y}


def test_no_contender_gives_no_rounds_to_time():
    assert list(orders([], 2)) == [(), ()]
    assert interleave({}, FakeClock({}), 1.0).spreads == {}


class FakeClock:
    """Milliseconds from a table; notes who was called, and whether `before` came first."""

    def __init__(self, milliseconds: dict[str, float]) -> None:
        self.milliseconds_of, self.calls = milliseconds, []

    def milliseconds(self, timed: Timed) -> float:
        if timed.before is not None:
            timed.before()
        name = timed.run()
        self.calls.append(name)
        return self.milliseconds_of[name]


def test_interleaving_takes_all_in_turn_after_a_round_that_does_not_count():
    clock = FakeClock({"a": 100.0, "b": 400.0})
    prepared = []
    timed = {"a": Timed(lambda: "a"), "b": Timed(lambda: "b", lambda: prepared.append("b"))}
    found = interleave(timed, clock, budget_s=3.0).spreads
    assert clock.calls[:4] == ["a", "b", "a", "b"]
    assert [set(clock.calls[start : start + 2]) for start in range(0, len(clock.calls), 2)] == [{"a", "b"}] * 7
    assert found["a"].median == 100.0
    assert found["b"].rounds == 6
    assert prepared == ["b"] * 7


def test_who_fails_drops_out_and_the_others_go_on():
    calls = []

    def fail_the_third_time():
        calls.append("b")
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return "b"

    timed = {"a": Timed(lambda: "a"), "b": Timed(fail_the_third_time)}
    found = interleave(timed, FakeClock({"a": 1.0, "b": 1.0}), budget_s=0.02)
    assert list(found.spreads) == ["a"]
    assert str(found.failures["b"]) == "out of memory"
    assert len(calls) == 3


def test_rounds_fit_the_budget_within_bounds():
    assert rounds_for(1000.0, 10.0) == 10
    assert rounds_for(10_000.0, 10.0) == 5
    assert rounds_for(10_000.0, 10.0, at_least=3) == 3
    assert rounds_for(0.001, 10.0) == 50


def test_quantiles_interpolate():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0], 0.9) == 1.0
    assert quantile(list(range(11)), 0.9) == pytest.approx(9.0)
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="quantile of nothing"):
        quantile([], 0.5)
    values = spread([5.0, 1.0, 3.0])
    assert (values.median, values.rounds) == (3.0, 3)
    assert values.p10 < values.median < values.p90
