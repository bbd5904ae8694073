"""Sampling from engines whose outputs come one by one: what is decided is what waiting for everything would have decided.

The engine is a fake that finishes its requests in a random order, a few at a time, on ranks that are threads; the judge is slow
now and then. Outputs and verdicts are functions of the request's seed, so the same prompts give the same groups whatever the
order.
"""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_sampler import DRAW, PROMPTS, ThreadRanks, encode, named, no_phase

from rollout.engine import Decoding, EngineError
from rollout.prompts import PromptSource
from rollout.sampler import RECOVERIES, EarlyScoring, Sampler, SamplingStalled
from rollout.types import Sample, Verdict
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import VllmGeneration
from rollout.vllm.settings import VllmSettings


class StreamingEngine:
    """A random one of the requests finishes at each poll. slow: prompts whose outputs do only after
    30 polls in which nothing else did. dies: polls after which it is lost,
    each number once."""

    name, streams = "fake", True

    def __init__(self, rank, *, slow=frozenset(), dies=(), at_once=False):
        self._random = random.Random(rank)
        self._slow, self._dies, self._at_once = slow, list(dies), at_once
        self.idle = 0
        self.polls, self.submissions, self.additions, self.aborted, self.lost = 0, 0, 0, 0, False

    def submit(self, requests, decoding, progress=None):
        if self.lost:
            raise EngineError("fake: lost")
        self.submissions += 1
        return Generation(self, requests)

    def restart(self):
        self.lost = False


class Generation:
    def __init__(self, engine, requests):
        self._engine, self._left = engine, list(enumerate(requests))
        self._count = len(requests)

    @property
    def done(self):
        return not self._left

    def add(self, requests):
        if self._engine.lost:
            raise EngineError("fake: lost")
        self._engine.additions += 1
        self._left += list(enumerate(requests, self._count))
        self._count += len(requests)

    def poll(self, seconds):
        engine = self._engine
        engine.polls += 1
        if engine._dies and engine.polls >= engine._dies[0]:
            engine._dies.pop(0)
            engine.lost = True
        if engine.lost:
            raise EngineError("fake: lost")
        ready = [each for each in self._left if int(each[1].prompt_token_ids[2]) - 3 not in engine._slow]
        engine.idle = 0 if ready or not self._left else engine.idle + 1
        ready = self._left[:] if engine.idle > 30 else ready
        engine._random.shuffle(ready)
        now = ready if engine._at_once else ready[:1]
        self._left = [each for each in self._left if each not in now]
        time.sleep(0.003)  # decoding takes longer than judging, mostly
        return [(place, sample_of(request)) for place, request in now]

    def abort(self):
        self._engine.aborted += len(self._left)
        self._left = []


def sample_of(request):
    return Sample(np.array([request.seed % 2**31], np.int32), np.zeros(1, np.float32), "stop", 0)


class SeedJudge:
    """A right answer in six, by the seed of the output."""

    def judge(self, pairs):
        if pairs and int(pairs[0][1].token_ids[0]) % 7 == 0:
            time.sleep(0.01)
        return [
            Verdict(int(sample.token_ids[0]) % 6 == 0, "rule", f"{prompt.id}/{sample.token_ids[0]}") for prompt, sample in pairs
        ]


def run(size, work, *, engine=StreamingEngine, recover=None, judge=None):
    """work(sampler, source or None, engine, rank) on each rank; the results in order of rank."""
    barrier, mailbox = threading.Barrier(size), [None] * size
    engines = [engine(rank) for rank in range(size)]

    def one(rank):
        ranks = ThreadRanks(rank, size, barrier, mailbox)
        revive = None if recover is None else lambda errors: recover(engines[rank], rank, errors)
        sampler = Sampler(engines[rank], judge or SeedJudge(), encode, ranks, no_phase, 5, revive)
        try:
            return work(sampler, PromptSource(PROMPTS, 1) if rank == 0 else None, engines[rank], rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]


def record(sampler, source, steps=5, draw=DRAW, early=None):
    rows = []
    for step in range(steps):
        collected = sampler.collect(replace(draw, step=step), source, early)
        state = sampler.state
        rows.append((named(collected.batch), named(state.buffer), state.ledger.as_dict(), collected.rounds))
    return rows


class WaitingEngine(StreamingEngine):
    """Everything at the first poll, and no request while it decodes: one round after the other."""

    streams = False

    def __init__(self, rank):
        super().__init__(rank, at_once=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_order_of_arrival_decides_nothing(size):
    draw = replace(DRAW, prompts_per_round=8, groups=7)
    (waiting,) = run(1, lambda sampler, source, engine, rank: record(sampler, source, draw=draw), engine=WaitingEngine)
    assert any(rounds > 1 for *_, rounds in waiting), "more than one round must be exercised"
    assert any(buffer for _, buffer, _, _ in waiting), "the buffer must be exercised"
    added = []

    def work(sampler, source, engine, rank):
        rows = record(sampler, source, draw=draw)
        added.append(engine.additions)
        return rows

    assert run(size, work)[0] == waiting
    assert sum(added) > 0, "a round that was certain to be needed began before the last one ended"


def test_a_round_is_never_begun_early_where_the_one_in_flight_may_be_enough():
    """One prompt is stuck until all others have landed, and with it there may be enough."""

    class Halves:
        """Every group legitimate."""

        def judge(self, pairs):
            return [Verdict(int(sample.token_ids[0]) % 2 == 0, "rule", prompt.id) for prompt, sample in pairs]

    def work(sampler, source, engine, rank):
        collected = sampler.collect(replace(DRAW, groups=1, group_size=24), source)
        assert collected.rounds == 1
        return engine.additions, engine.submissions

    assert run(1, work, judge=Halves()) == [(0, 1)]


def test_verdicts_come_while_the_rest_decodes():
    """The judge sees the first outputs before the engine has finished the last."""
    seen = []

    class Watching(SeedJudge):
        def judge(self, pairs):
            seen.append(watched.polls)
            return super().judge(pairs)

    def work(sampler, source, engine, rank):
        nonlocal watched
        watched = engine
        collected = sampler.collect(DRAW, source)
        assert collected.seconds["reward_hidden"] >= 0
        return engine.polls

    watched = None
    (polls,) = run(1, work, judge=Watching())
    assert min(seen) < polls / 2


@pytest.mark.parametrize("size", [1, 2])
def test_surplus_is_aborted_and_counted(size):
    """Some prompts take very long; a step ends without them as soon as enough others are legitimate."""

    def work(sampler, source, engine, rank):
        rows = []
        for step in range(4):
            collected = sampler.collect(replace(DRAW, step=step, prompts_per_round=20, abort_surplus=True), source)
            rows.append(collected)
            ledger, state = sampler.state.ledger, sampler.state
            if rank == 0:
                assert ledger.pending() == len(state.buffer)
        return sampler.state.ledger, engine.aborted, [len(row.batch) for row in rows]

    results = run(size, work, engine=lambda rank: StreamingEngine(rank, slow=frozenset({0, 5, 9})))
    ledger, _, sizes = results[0]
    assert sizes == [DRAW.groups] * 4
    assert ledger.aborted >= 3
    assert ledger.drawn == ledger.trained + ledger.recovered + ledger.uniform + ledger.expired + ledger.aborted + ledger.pending()
    assert sum(aborted for _, aborted, _ in results) > 0


def test_nothing_is_sampled_where_the_recovered_groups_fill_the_batch_and_surplus_is_aborted():
    def work(sampler, source, engine, rank):
        step = 0
        while len(sampler.state.buffer) < DRAW.groups:
            sampler.collect(replace(DRAW, step=step, prompts_per_round=30), source)
            step += 1
        drawn = sampler.state.ledger.drawn
        buffer = named(sampler.state.buffer)
        collected = sampler.collect(replace(DRAW, step=step, abort_surplus=True), source)
        assert sampler.state.ledger.drawn == drawn
        assert named(collected.batch) == buffer[: DRAW.groups]

    run(1, work)


def revive(engine, rank, errors):
    assert any(errors)
    engine.restart()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("polls", [1, 2, 5, 9])
def test_a_lost_engine_loses_no_prompt(size, polls):
    (undisturbed,) = run(1, lambda sampler, source, engine, rank: record(sampler, source), engine=WaitingEngine)
    disturbed = run(
        size,
        lambda sampler, source, engine, rank: record(sampler, source),
        engine=lambda rank: StreamingEngine(rank, dies=(polls + rank,)),
        recover=revive,
    )
    assert disturbed[0] == undisturbed


class HungEngine(StreamingEngine):
    """Until it is started anew, a vLLM whose process stands still: it reads nothing and says nothing."""

    silence = 3.0

    def __init__(self, rank, child):
        super().__init__(rank)
        self.child = child

    def submit(self, requests, decoding, progress=None):
        if self.child is None:
            return super().submit(requests, decoding, progress)
        return VllmGeneration(self.child, requests, {}, 1, self.silence, progress)

    def restart(self):
        if self.child is not None:
            self.child.kill()
        self.child = None


@pytest.mark.parametrize("size", [1, 2])
def test_a_hung_vllm_costs_its_silence_once_and_no_prompt(size, tmp_path, monkeypatch):
    """Asked to abort, it would be silent for as long again, and the other ranks wait meanwhile."""
    program = tmp_path / "hung"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr("rollout.vllm.child.sys", SimpleNamespace(executable=str(program)))
    child = VllmChild("rank 0's vLLM", VllmSettings("model", "float32", 64, 4, 1 << 20), tmp_path / "log")
    (undisturbed,) = run(1, lambda sampler, source, engine, rank: record(sampler, source, 1), engine=WaitingEngine)

    def work(sampler, source, engine, rank):
        start = time.monotonic()
        rows = record(sampler, source, 1)
        return rows, time.monotonic() - start

    def recover(engine, rank, errors):
        assert "silent for 3 s during generate" in errors[0]
        engine.restart()

    engine = lambda rank: StreamingEngine(rank) if rank else HungEngine(rank, child)  # noqa: E731
    rows, seconds = run(size, work, engine=engine, recover=recover)[0]
    assert rows == undisturbed
    assert HungEngine.silence < seconds < 1.5 * HungEngine.silence


@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_that_is_lost_again_and_again_ends_the_step_on_every_rank(size):
    def work(sampler, source, engine, rank):
        with pytest.raises(EngineError, match=f"lost.*after {RECOVERIES} restarts in one step"):
            sampler.collect(DRAW, source)
        return True

    last = size - 1
    engine = lambda rank: StreamingEngine(rank, dies=range(1, 99) if rank == last else ())  # noqa: E731
    assert all(run(size, work, engine=engine, recover=revive))


def test_without_a_way_to_recover_a_lost_engine_ends_the_step_on_every_rank():
    def work(sampler, source, engine, rank):
        with pytest.raises(EngineError, match="fake: lost"):
            sampler.collect(DRAW, source)
        return engine.aborted

    results = run(2, work, engine=lambda rank: StreamingEngine(rank, dies=(2,) if rank else ()))
    assert results[0] > 0, "the engine that is well has nothing left to do"


def test_a_failed_recovery_ends_the_step():
    def dead(engine, rank, errors):
        raise EngineError("it does not start again")

    def work(sampler, source, engine, rank):
        with pytest.raises(EngineError, match="does not start again"):
            sampler.collect(DRAW, source)

    run(2, work, engine=lambda rank: StreamingEngine(rank, dies=(1,)), recover=dead)


@pytest.mark.parametrize("size", [1, 2])
def test_groups_scored_early_are_in_the_batch_and_marked(size):
    def work(sampler, source, engine, rank):
        scored = []
        early = EarlyScoring(lambda groups: scored.extend(named(groups)), tokens=1)
        for step in range(4):
            scored.clear()
            collected = sampler.collect(replace(DRAW, step=step), source, early)
            batch = named(collected.batch)
            marked = [each for each, mark in zip(batch, collected.early, strict=True) if mark] if collected.early else []
            assert sorted(marked) == sorted(scored)
        return record(sampler, source, steps=1)

    run(size, work)


def test_early_scoring_waits_for_enough_tokens():
    def work(sampler, source, engine, rank):
        scored = []
        sampler.collect(DRAW, source, EarlyScoring(scored.append, tokens=10**9))
        assert not scored

    run(1, work)


def test_stalled_on_every_rank_with_streaming_engines():
    class AllWrong:
        def judge(self, pairs):
            return [Verdict(False, "wrong") for _ in pairs]

    def work(sampler, source, engine, rank):
        with pytest.raises(SamplingStalled, match=r"step 8: 0 of 4 groups after 3 rounds \(15 groups sampled: 0 all right, 15"):
            sampler.collect(replace(DRAW, step=7, max_rounds=3), source)

    run(2, work, judge=AllWrong())


def test_an_outputs_seed_depends_on_its_place_and_not_on_the_number_of_ranks():
    def work(sampler, source, engine, rank):
        sampler.collect(DRAW, source)
        return sampler.sample_groups(PROMPTS[:6], 3, Decoding(4), seed=(1, 2))

    alone, several = run(1, work)[0], run(3, work)[0]
    assert named(alone) == named(several)
    seeds = [int(sample.token_ids[0]) for group in alone for sample in group.samples]
    assert len(set(seeds)) == len(seeds) == 18
