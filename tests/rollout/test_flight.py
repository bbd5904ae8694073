"""What is decided before everything has come back: never anything else than what Algorithm 1 decides after it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.flight import Flight
from rollout.lane import Judged
from rollout.types import Prompt, Sample, Verdict

SAMPLE = Sample(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0)


def flight_of(*, needed=2, group_size=2, dynamic=True, recovered=0, prompts=4, long=()):
    flight = Flight(7, group_size, needed, dynamic, recovered)
    ids = [np.zeros(9 if place in long else 3, np.int32) for place in range(prompts)]
    assert flight.draw([Prompt(f"q{place}", "?", "!") for place in range(prompts)], ids, 8) == range(prompts)
    return flight


def land(flight, place, *rights, first=0):
    verdicts = [Verdict(right, "right" if right else "wrong") for right in rights]
    flight.take([Judged(place, first + output, SAMPLE, verdict) for output, verdict in enumerate(verdicts)])


def test_counts_by_hand():
    flight = flight_of(needed=3, recovered=1, long=(3,))
    assert (flight.finished(), flight.possible(), flight.landed) == (1, 4, False)
    land(flight, 0, True, True)  # uniform
    assert (flight.finished(), flight.possible()) == (1, 3)
    land(flight, 2, False, True)
    assert (flight.finished(), flight.possible(), flight.certain()) == (2, 3, [2])
    land(flight, 1, True)
    assert (flight.finished(), flight.possible(), flight.landed) == (2, 3, False)
    land(flight, 1, True, first=1)
    assert (flight.finished(), flight.possible(), flight.landed) == (2, 2, True)
    (outcome,) = flight.outcome()
    assert [group.prompt.id for group in outcome.groups] == ["q0", "q1", "q2"]
    assert (outcome.drawn, outcome.aborted) == (4, 0), "the one that was too long failed, which is no abort"
    assert {group.drawn_step for group in outcome.groups} == {7}


def test_without_dynamic_sampling_a_uniform_group_is_kept():
    flight = flight_of(dynamic=False)
    land(flight, 0, True, True)
    assert (flight.finished(), flight.possible()) == (1, 4)


def test_what_is_incomplete_at_the_end_was_aborted():
    flight = flight_of()
    land(flight, 1, True, False)
    land(flight, 2, True)
    (outcome,) = flight.outcome()
    assert ([group.prompt.id for group in outcome.groups], outcome.aborted) == (["q1"], 3)


def test_an_output_that_comes_twice_is_a_defect():
    flight = flight_of()
    land(flight, 1, True)
    with pytest.raises(ValueError, match="output 0 of prompt q1 came twice"):
        land(flight, 1, True)


def test_a_group_is_certain_only_where_fewer_than_n_may_come_before_it():
    flight = flight_of(needed=2, prompts=4)
    land(flight, 2, True, False)
    assert flight.certain() == [], "the two before it may both be legitimate"
    land(flight, 0, True, True)
    assert flight.certain() == [2]
    land(flight, 3, True, False)
    assert flight.certain() == [2], "q3 has q1 and q2 before it"
    land(flight, 1, False, False)
    assert flight.certain() == [2, 3]


@settings(max_examples=300, deadline=None)
@given(
    rights=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=9),
    needed=st.integers(1, 6),
    recovered=st.integers(0, 6),
    dynamic=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_what_is_certain_early_is_true_in_the_end(rights, needed, recovered, dynamic, order):
    """In every order of arrival: `possible` never rises and ends as `finished`; a certain group lies within the first N."""
    flight = flight_of(needed=needed, group_size=3, dynamic=dynamic, recovered=recovered, prompts=len(rights))
    arrivals = [(place, output) for place in range(len(rights)) for output in range(3)]
    order.shuffle(arrivals)
    claims, most = set(), flight.possible()
    for place, output in arrivals:
        land(flight, place, rights[place][output], first=output)
        assert flight.finished() <= flight.possible() <= most
        most = flight.possible()
        now = flight.certain()
        assert claims <= set(now), "what was certain stays so"
        claims |= set(now)
    assert flight.landed
    assert flight.possible() == flight.finished()
    kept = [place for place, row in enumerate(rights) if not dynamic or 0 < sum(row) < 3]
    assert flight.certain() == kept[: max(0, needed - recovered)]
    assert flight.finished() == recovered + len(kept)
