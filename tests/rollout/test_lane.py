"""One judging at a time: what finishes while the judge is busy is judged together afterwards, each output once, none forgotten.

The engine and its outputs are those of test_streaming.py.
"""

import random
import threading
import time

import numpy as np
import pytest
from test_streaming import StreamingEngine

from rollout import lane as lane_module
from rollout.engine import Decoding, Request
from rollout.lane import Job, Lane
from rollout.types import Prompt, Verdict

DECODING = Decoding(4, 1.0, 1.0)
PROMPT = Prompt("q", "?", "!")


def jobs(count, first=0):
    ids = np.arange(3, dtype=np.int32)
    return [Job(place, place % 4, PROMPT, Request(ids, seed=100 + place)) for place in range(first, first + count)]


class Judge:
    """Its verdicts name the output's token, which is the seed of its request."""

    def __init__(self, busy):
        self.calls, self._busy = [], busy

    def judge(self, pairs):
        self._busy()
        self.calls.append([int(sample.token_ids[0]) for _, sample in pairs])
        return [Verdict(True, "right", str(token)) for token in self.calls[-1]]


def check(judged, judge, count):
    assert sorted((each.place, each.output) for each in judged) == [(place, place % 4) for place in range(count)]
    for each in judged:
        assert each.verdict.detail == str(each.sample.token_ids[0]) == str(100 + each.place)
    order = [100 + each.place for each in judged]
    assert order == [token for call in judge.calls for token in call], "in the order they were judged"


def test_a_hanging_judge_is_asked_once_for_all_that_finished_meanwhile():
    """Its time-out is paid once for the outputs that came first and once for the rest, not once for each poll."""
    ends = threading.Event()
    judge, judged = Judge(lambda: ends.wait(60)), []
    with Lane(StreamingEngine(0), judge, lambda *_: None) as lane:
        lane.add(jobs(50), DECODING)
        while lane.unsampled():
            judged += lane.poll(0.2)
        assert not judged
        ends.set()
        while not lane.done:
            judged += lane.poll(0.2)
    assert len(judge.calls) == 2
    check(judged, judge, 50)


def test_a_slow_judge_is_asked_at_most_as_often_as_it_has_time_to():
    judge, judged, start = Judge(lambda: time.sleep(0.2)), [], time.perf_counter()
    with Lane(StreamingEngine(0), judge, lambda *_: None) as lane:
        lane.add(jobs(50), DECODING)
        while lane.unsampled():
            judged += lane.poll(0.2)
        sampled = time.perf_counter() - start
        while not lane.done:
            judged += lane.poll(0.2)
    assert len(judge.calls) <= sampled / 0.2 + 2
    check(judged, judge, 50)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_output_is_judged_once_whatever_the_pace(seed, overlap):
    pace = random.Random(seed)
    judge, judged, more = Judge(lambda: time.sleep(pace.random() * 0.01)), [], jobs(20, first=40)
    with Lane(StreamingEngine(seed), judge, lambda *_: None, overlap=overlap) as lane:
        lane.add(jobs(40), DECODING)
        while not lane.done:
            if len(lane.unsampled()) == 20 and more:
                lane.add(more, DECODING)
                more = []
            judged += lane.poll(0.01)
            assert overlap or not judged or not lane.unsampled()
    assert overlap or len(judge.calls) == 1
    check(judged, judge, 60)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_call_of_the_judge_has_an_end_however_much_waits(monkeypatch, overlap):
    """Its deadline holds for all of it."""
    monkeypatch.setattr(lane_module, "MOST", 7)
    ends = threading.Event()
    judge, judged = Judge(lambda: ends.wait(60)), []
    with Lane(StreamingEngine(0), judge, lambda *_: None, overlap=overlap) as lane:
        lane.add(jobs(50), DECODING)
        while lane.unsampled():
            judged += lane.poll(0.2)
        ends.set()
        while not lane.done:
            judged += lane.poll(0.2)
    assert max(map(len, judge.calls)) == 7
    assert len(judge.calls) in (8, 9)
    check(judged, judge, 50)
