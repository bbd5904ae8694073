"""A sample without a verdict: its group fails, in every mode, whenever it is known, and in the ledger exactly once; it is neither
trained on nor recovered, and no early decision differs from the late one. And a judge that stays silent ends the run.

The decisions are compared with the plain reading of Algorithm 1 in which a group that holds an unjudged sample was never drawn
into anything but the count.
"""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import EngineError
from rollout.flight import Flight, Silence
from rollout.lane import Judged
from rollout.recovery import BatchCollector, Ledger, kept, legitimate
from rollout.reward.correctness import Correctness
from rollout.reward.format import Response
from rollout.sampler import SamplingStalled
from rollout.types import Group, Prompt, Sample, Verdict
from tests.rollout.test_sampler import DRAW, FakeJudge, named, run

SAMPLE = Sample(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0)
RIGHT, WRONG, NONE = Verdict(True, "right"), Verdict(False, "wrong"), Verdict.unjudged("the endpoint is gone")
FORMAT = Verdict(False, "format")
KINDS = {"r": RIGHT, "w": WRONG, "-": NONE, "f": FORMAT}
MARKED = {"judge": True}


def group_of(kinds, name="q", step=0):
    verdicts = tuple(KINDS[kind] for kind in kinds)
    return Group(Prompt(name, "?", "!", metadata=MARKED), np.zeros(1, np.int32), (SAMPLE,) * len(kinds), verdicts, step)


# One sample, one group


def test_an_unjudged_sample_is_neither_right_nor_wrong():
    assert not NONE.judged
    assert not NONE.right
    with pytest.raises(ValueError, match=r"no reward .the endpoint is gone"):
        _ = NONE.reward
    with pytest.raises(ValueError, match="no reward"):
        _ = group_of("r-w").rewards
    assert all(verdict.judged for verdict in (RIGHT, WRONG, FORMAT, Verdict(False, "error"), Verdict(False, "timeout")))


@pytest.mark.parametrize(
    ("kinds", "dynamic", "static"),
    [
        ("rw", True, True),
        ("rr", False, True),
        ("ww", False, True),
        ("r-", False, False),
        ("rw-", False, False),
        ("--", False, False),
    ],
)
def test_what_is_kept(kinds, dynamic, static):
    group = group_of(kinds)
    assert (legitimate(group), kept(group, True), kept(group, False)) == (dynamic, dynamic, static)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_ledger_by_hand(dynamic):
    ledger = Ledger()
    collector = BatchCollector(0, 1, dynamic, [], ledger)
    groups = [group_of(kinds, name) for name, kinds in zip("abcdef", ["rw", "r-", "rr", "--", "rw", "w-"], strict=True)]
    collector.add_round(groups, drawn=9, aborted=1)  # and two that were too long
    batch, buffer = collector.finish(recover=dynamic)
    assert [group.prompt.id for group in batch] == ["a"]
    assert [group.prompt.id for group in buffer] == (["e"] if dynamic else [])
    assert ledger == Ledger(drawn=9, trained=1, uniform=int(dynamic), aborted=1, failed=5, expired=0 if dynamic else 2)
    assert ledger.pending() == len(buffer)
    assert collector.sampled == groups, "the metrics see them"


# A flight


def flight_of(rows, *, needed, recovered=0, dynamic=True, silence=Silence()):  # noqa: B008 - frozen
    size = len(rows[0])
    flight = Flight(7, size, needed, dynamic, recovered, silence)
    prompts = [Prompt(f"q{place}", "?", "!", metadata=MARKED) for place in range(len(rows))]
    flight.draw(prompts, [np.zeros(1, np.int32)] * len(rows), 8)
    return flight


def land(flight, place, output, kind):
    flight.take([Judged(place, output, SAMPLE, KINDS[kind])])


def test_a_group_is_out_as_soon_as_one_sample_has_no_verdict():
    flight = flight_of(["xx", "xx", "xx"], needed=2)
    assert flight.possible() == 3
    land(flight, 0, 1, "-")
    assert (flight.possible(), flight.finished(), flight.landed) == (2, 0, False)
    land(flight, 1, 0, "r")
    land(flight, 1, 1, "w")
    land(flight, 2, 0, "r")
    land(flight, 2, 1, "w")
    assert flight.certain() == [1, 2], "the first cannot come before them any more"
    assert not flight.landed, "its other output is still under way"
    land(flight, 0, 0, "r")
    assert (flight.finished(), flight.possible(), flight.landed) == (2, 2, True)
    assert flight.certain() == [1, 2]


@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(st.text("rwf-", min_size=3, max_size=3), min_size=1, max_size=9),
    needed=st.integers(1, 6),
    recovered=st.integers(0, 6),
    dynamic=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_what_is_certain_early_is_true_in_the_end(rows, needed, recovered, dynamic, order):
    flight = flight_of(rows, needed=needed, recovered=recovered, dynamic=dynamic)
    arrivals = [(place, output) for place in range(len(rows)) for output in range(3)]
    order.shuffle(arrivals)
    claims, most = set(), flight.possible()
    for place, output in arrivals:
        land(flight, place, output, rows[place][output])
        assert flight.finished() <= flight.possible() <= most
        most = flight.possible()
        now = flight.certain()
        assert claims <= set(now), "what was certain stays so"
        assert not any("-" in rows[claimed] for claimed in now)
        claims |= set(now)
    expected = [place for place, row in enumerate(rows) if "-" not in row and (not dynamic or 0 < row.count("r") < 3)]
    assert flight.landed
    assert flight.possible() == flight.finished() == recovered + len(expected)
    assert flight.certain() == expected[: max(0, needed - recovered)]
    ledger = Ledger()
    collector = BatchCollector(7, needed, dynamic, [], ledger)
    for each in flight.outcome():
        collector.add_round(each.groups, each.drawn, each.aborted)
    collector.finish(recover=dynamic)
    assert ledger.failed == sum("-" in row for row in rows)
    assert ledger.uniform == (sum("-" not in row and row.count("r") in (0, 3) for row in rows) if dynamic else 0)
    assert ledger.drawn == len(rows)


# Silence


def silent_after(rounds, before=Silence()):  # noqa: B008 - frozen
    """Rounds of rows of kinds; a space has not come back."""
    flight = Flight(0, 2, 4, True, silence=before)
    for rows in rounds:
        first = len(flight.drawn)
        marks = [{} if row.startswith("rule") else MARKED for row in rows]
        flight.draw([Prompt("q", "?", "!", metadata=mark) for mark in marks], [np.zeros(1, np.int32)] * len(rows), 8)
        for place, row in enumerate(rows, start=first):
            for output, kind in enumerate(row.removeprefix("rule")):
                if kind != " ":
                    land(flight, place, output, kind)
    return flight.silent()


@pytest.mark.parametrize(
    ("rounds", "before", "count"),
    [
        ([], 0, 0),
        ([], 2, 2),
        ([["--"]], 0, 1),
        ([["--"], ["-f"]], 1, 3),
        ([["--", "rf"]], 5, 0),
        ([["--"], ["rw"], ["--"]], 5, 1),
        ([["ff", "ff"]], 2, 2),
        ([["rulerw", "rulerr"]], 2, 2),
        ([["--", "rulerw"]], 2, 3),
        ([["rule--", "ruler-"]], 2, 2),
        ([["--", "rule--"]], 2, 3),
        ([["rf", "rule--"]], 2, 0),
        ([["- "]], 2, 2),
        ([["- "], ["--"]], 2, 3),
        ([["w "]], 2, 0),
    ],
)
def test_rounds_in_a_row_without_a_verdict(rounds, before, count):
    assert silent_after(rounds, Silence(before, "before")).rounds == count


# The sampler


class PartlySilentJudge(FakeJudge):
    """FakeJudge, but about one output in `one_in` has no verdict, by a hash of the prompt and the output's number."""

    def __init__(self, one_in):
        self.one_in = one_in

    def judge(self, pairs):
        return [
            Verdict.unjudged(verdict.detail) if self.silent(prompt, sample) else verdict
            for (prompt, sample), verdict in zip(pairs, super().judge(pairs), strict=True)
        ]

    def silent(self, prompt, sample):
        return hashlib.sha256(f"silent/{prompt.id}/{sample.token_ids[0]}".encode()).digest()[0] % self.one_in == 0


class SilentJudge:
    def __init__(self):
        self.asked = 0

    def judge(self, pairs):
        self.asked += len(pairs)
        return [NONE] * len(pairs)


MARKED_PROMPTS = [Prompt(f"q{index}", f"question {index}", "1", metadata=MARKED) for index in range(40)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_step_with_unjudged_samples(dynamic):
    draw = replace(DRAW, dynamic=dynamic, recover=dynamic, max_rounds=60)

    def work(sampler, source, engine, rank):
        seen = []
        for step in range(6):
            collected = sampler.collect(replace(draw, step=step), source)
            assert all(group.judged for group in collected.batch + sampler.state.buffer)
            assert len(collected.batch) == draw.groups
            if rank == 0:
                ledger = sampler.state.ledger
                assert ledger.pending() == len(sampler.state.buffer)
                seen.append((named(collected.batch), ledger.as_dict()))
                seen[-1] += (sum(not group.judged for group in collected.sampled),)
        if rank == 0:
            assert sampler.state.ledger.failed == sum(each[2] for each in seen) > 0
        return seen

    (alone,) = run(1, work, judge=PartlySilentJudge(9), prompts=MARKED_PROMPTS)
    assert run(2, work, judge=PartlySilentJudge(9), prompts=MARKED_PROMPTS)[0] == alone


@pytest.mark.parametrize("size", [1, 2])
def test_a_judge_that_stays_silent_ends_the_run_on_every_rank(size):
    judge = SilentJudge()
    draw = replace(DRAW, max_rounds=50, max_unjudged_rounds=3)

    def work(sampler, source, engine, rank):
        for _ in range(2):
            with pytest.raises(EngineError, match="no verdict in 3 rounds in a row, the last time for: the endpoint is gone"):
                sampler.collect(draw, source)
        return len(engine.seeds)

    assert run(size, work, judge=judge, prompts=MARKED_PROMPTS) == [3] * size
    assert judge.asked == 3 * draw.prompts_per_round * draw.group_size


def test_a_silent_judge_ends_the_run_also_where_the_rule_fills_the_batches():
    half = [prompt if place % 2 else replace(prompt, metadata={}) for place, prompt in enumerate(MARKED_PROMPTS)]

    class HalfSilent(FakeJudge):
        def judge(self, pairs):
            return [
                NONE if prompt.metadata else verdict for (prompt, _), verdict in zip(pairs, super().judge(pairs), strict=True)
            ]

    def work(sampler, source, engine, rank):
        draw, steps = replace(DRAW, groups=1, recover=False, max_unjudged_rounds=4), 0
        error = None
        while error is None and steps < 20:
            try:
                sampler.collect(replace(draw, step=steps), source)
                steps += 1
            except EngineError as raised:
                error = str(raised)
        assert re.search("in [45] rounds in a row", error)
        assert steps > 1, "one step must not hold them all"
        return len(engine.seeds)

    assert run(1, work, judge=HalfSilent(), prompts=half) in ([4], [5])


def test_the_judge_is_told_apart_from_a_rule_that_ran_out_of_time():
    flight = Flight(0, 1, 1, True)
    flight.draw([Prompt("q", "?", "!", metadata=mark) for mark in (MARKED, {})], [np.zeros(1, np.int32)] * 2, 8)
    late = Verdict.unjudged("no verdict within the batch's 5 s")
    flight.take([Judged(0, 0, SAMPLE, NONE), Judged(1, 0, SAMPLE, late)])
    assert flight.silent() == Silence(1, NONE.detail)


def test_without_a_bound_the_rounds_are_bounded_and_the_judge_is_named():
    def work(sampler, source, engine, rank):
        with pytest.raises(
            SamplingStalled, match=r"0 all right, 0 all wrong, 15 that the judge left without a verdict\).*see to the judge"
        ):
            sampler.collect(replace(DRAW, max_rounds=3), source)

    run(1, work, judge=SilentJudge(), prompts=MARKED_PROMPTS)


# Rule and judge together


class Rule:
    def __init__(self):
        self.asked, self.closed = [], False

    def verify(self, pairs):
        self.asked.append([answer for _, answer in pairs])
        return [Verdict(answer == prompt.answer, "rule") for prompt, answer in pairs]

    def close(self):
        self.closed = True


class Judging(Rule):
    def start(self, pairs):
        self.asked.append([(response.thinking, response.answer) for _, response in pairs])
        return self

    def result(self):
        return [Verdict(True, f"judge {answer}") for _, answer in self.asked[-1]]


def pairs_of(text):
    """A letter each; capitals are for the judge."""
    return [(Prompt(letter, "?", "a", metadata={"judge": letter.isupper()}), Response("t", letter)) for letter in text]


def test_each_prompt_goes_to_its_own_and_each_verdict_to_its_place():
    rule, judge = Rule(), Judging()
    with Correctness(rule, judge) as correctness:
        verdicts = correctness.verify(pairs_of("aBbCA"))
        assert [verdict.reason for verdict in verdicts] == ["rule", "judge B", "rule", "judge C", "judge A"]
        assert [verdict.right for verdict in verdicts] == [True, True, False, True, True]
        assert (rule.asked, judge.asked) == ([["a", "b"]], [[("t", "B"), ("t", "C"), ("t", "A")]])
        correctness.verify(pairs_of("b"))
        correctness.verify(pairs_of("B"))
        assert (len(rule.asked), len(judge.asked)) == (2, 2), "nobody is asked about nothing"
    assert rule.closed
    assert judge.closed


def test_without_a_judge_its_prompts_stay_unjudged():
    verdicts = Correctness(Rule()).verify(pairs_of("aAb"))
    assert [verdict.reason for verdict in verdicts] == ["rule", "unjudged", "rule"]


@pytest.mark.parametrize("value", ["true", 1, None, "false", [True]])
def test_only_true_is_true(value):
    prompt = Prompt("q", "?", "a", metadata={"judge": value})
    assert Correctness(Rule(), Judging()).verify([(prompt, Response("t", "a"))])[0].reason == "rule"


def test_the_rule_and_the_judge_work_at_once():
    import time
    from concurrent.futures import ThreadPoolExecutor

    class Slow(Judging):
        def start(self, pairs):
            return pool.submit(lambda: (time.sleep(0.4), [RIGHT] * len(pairs))[1])

        def verify(self, pairs):
            time.sleep(0.4)
            return [RIGHT] * len(pairs)

    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        Correctness(Slow(), Slow()).verify(pairs_of("aA"))
        assert time.monotonic() - start < 0.7
