"""The sampler with a fake engine and a fake judge: what is decided must not depend on how many ranks sampled.

Ranks are threads that meet at a barrier, which is all that a broadcast or a gather is. The fake engine numbers the outputs of a
round (output k went to rank k modulo the number of ranks), so a group that was put together wrongly shows.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from rollout.engine import Decoding
from rollout.prompts import PromptSource
from rollout.recovery import Ledger
from rollout.sampler import Draw, Sampler, SamplingStalled
from rollout.types import Prompt, Sample, Verdict

PROMPTS = [Prompt(f"q{index}", f"question {index}", "1") for index in range(40)]
DRAW = Draw(
    step=0,
    groups=4,
    group_size=3,
    prompts_per_round=5,
    dynamic=True,
    max_rounds=50,
    max_prompt_tokens=8,
    recover=True,
    capacity=None,
    decoding=Decoding(max_new_tokens=4),
)


class ThreadRanks:
    """`rollout.ranks.Ranks` over threads."""

    def __init__(self, rank, size, barrier, mailbox):
        self.rank, self.size, self._barrier, self._mailbox = rank, size, barrier, mailbox

    @property
    def first(self):
        return self.rank == 0

    def _exchange(self, value):
        self._mailbox[self.rank] = value
        self._barrier.wait(timeout=20)
        values = list(self._mailbox)
        self._barrier.wait(timeout=20)
        return values

    def broadcast(self, value):
        return self._exchange(value)[0]

    def gather(self, value):
        values = self._exchange(value)
        return values if self.first else None


class FakeEngine:
    """Output k of a round is the token k. Remembers the seeds it was given."""

    name = "fake"
    streams = False

    def __init__(self, ranks):
        self._ranks, self.seeds, self.requests, self.request_seeds = ranks, [], [], []

    def submit(self, requests, decoding, progress=None):
        self.seeds.append(decoding.seed)
        self.requests.append([request.prompt_token_ids.tolist() for request in requests])
        self.request_seeds.append([request.seed for request in requests])
        if progress is not None:
            progress(len(requests), len(requests))
        numbers = [self._ranks.rank + place * self._ranks.size for place in range(len(requests))]
        return FakeGeneration([Sample(np.array([k], np.int32), np.zeros(1, np.float32), "stop", 0) for k in numbers])


class FakeGeneration:
    """All at the first poll."""

    def __init__(self, samples):
        self._left = samples

    @property
    def done(self):
        return not self._left

    def poll(self, seconds):
        left, self._left = self._left, []
        return list(enumerate(left))

    def abort(self):
        self._left = []


class FakeJudge:
    """About one output in six is right, by a hash of the prompt and the output's number."""

    def judge(self, pairs):
        return [self._verdict(prompt, int(sample.token_ids[0])) for prompt, sample in pairs]

    @staticmethod
    def _verdict(prompt, k):
        chance = hashlib.sha256(f"{prompt.id}/{k}".encode()).digest()[0]
        return Verdict(chance < 43, "right" if chance < 43 else "wrong", f"{prompt.id}/{k}")


class UniformJudge:
    def judge(self, pairs):
        return [Verdict(prompt.id == "q0", "right") for prompt, _ in pairs]


@contextmanager
def no_phase(*_):
    class Bar:
        def advance(self, *_, **__):
            pass

    yield Bar()


def encode(prompt):
    return [1, 2, int(prompt.id[1:]) + 3]


def run(size, work, *, judge=None, encode=encode, seed=5, prompts=PROMPTS):
    """work(sampler, source or None, engine, rank) on each of `size` ranks; the results in order of rank."""
    barrier, mailbox = threading.Barrier(size), [None] * size

    def one(rank):
        ranks = ThreadRanks(rank, size, barrier, mailbox)
        engine = FakeEngine(ranks)
        sampler = Sampler(engine, judge or FakeJudge(), encode, ranks, no_phase, seed)
        try:
            return work(sampler, PromptSource(prompts, 1) if rank == 0 else None, engine, rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]


def named(groups):
    return [(group.prompt.id, group.drawn_step, [verdict.detail for verdict in group.verdicts]) for group in groups]


def steps_of(size):
    def work(sampler, source, engine, rank):
        record = []
        for step in range(5):
            collected = sampler.collect(replace(DRAW, step=step), source)
            state = sampler.state
            record.append((named(collected.batch), named(state.buffer), state.ledger.as_dict(), collected.rounds))
            for group in collected.batch:
                for sample, verdict in zip(group.samples, group.verdicts, strict=True):
                    assert verdict.detail == f"{group.prompt.id}/{sample.token_ids[0]}", (
                        "a verdict stands beside another's sample"
                    )
                numbers = [int(sample.token_ids[0]) for sample in group.samples]
                assert numbers == list(range(numbers[0], numbers[0] + DRAW.group_size)), "a group's outputs are in order"
                assert group.prompt_token_ids.tolist() == encode(group.prompt)
        return record

    return run(size, work)


def test_decisions_do_not_depend_on_the_number_of_ranks():
    (alone,) = steps_of(1)
    assert any(buffer for _, buffer, _, _ in alone), "the buffer must be exercised"
    assert any(rounds > 1 for *_, rounds in alone), "more than one round must be exercised"
    for size in (2, 3):
        ranks = steps_of(size)
        assert ranks[0] == alone
        for other in ranks[1:]:
            assert [(batch, rounds) for batch, _, _, rounds in other] == [(batch, rounds) for batch, _, _, rounds in alone]
            assert all(not buffer and ledger["drawn"] == 0 for _, buffer, ledger, _ in other), "the state is on rank 0 alone"


def test_outputs_are_dealt_evenly():
    def work(sampler, source, engine, rank):
        sampler.collect(DRAW, source)
        return [len(requests) for requests in engine.requests]

    for counts in zip(*run(2, work), strict=True):
        assert sum(counts) == DRAW.prompts_per_round * DRAW.group_size
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [1, 2])
def test_stalled_on_every_rank_and_saying_why(size):
    def work(sampler, source, engine, rank):
        with pytest.raises(
            SamplingStalled, match=r"step 8: 0 of 4 groups after 3 rounds \(15 groups sampled: \d+ all right, \d+ all wrong\)"
        ):
            sampler.collect(replace(DRAW, step=7, max_rounds=3), source)
        return len(engine.seeds)

    assert run(size, work, judge=UniformJudge()) == [3] * size


def test_the_last_allowed_round_may_complete_the_batch():
    def work(sampler, source, engine, rank):
        rounds = sampler.collect(DRAW, source).rounds
        assert rounds > 1
        again = Sampler(engine, FakeJudge(), encode, sampler._ranks, no_phase, 5)
        assert again.collect(replace(DRAW, max_rounds=rounds), PromptSource(PROMPTS, 1)).rounds == rounds

    run(1, work)


def test_prompts_that_are_too_long_fail():
    def long_for_even(prompt):
        return list(range(1, 10)) if int(prompt.id[1:]) % 2 == 0 else list(range(1, 9))

    def work(sampler, source, engine, rank):
        collected = sampler.collect(DRAW, source)
        if rank == 0:
            drawn = PromptSource(PROMPTS, 1).draw(sampler.state.ledger.drawn)
            even = sum(int(prompt.id[1:]) % 2 == 0 for prompt in drawn)
            assert sampler.state.ledger.failed == even > 0
            assert all(int(group.prompt.id[1:]) % 2 for group in collected.sampled)
            assert sampler.state.ledger.pending() == len(sampler.state.buffer)
        assert all(len(ids) <= DRAW.max_prompt_tokens for requests in engine.requests for ids in requests)

    run(2, work, encode=long_for_even)


@pytest.mark.parametrize(("per_round", "draws"), [(100, [4]), (3, [3, 1])])
def test_without_dynamic_sampling_just_what_is_missing_is_drawn(per_round, draws):
    def work(sampler, source, engine, rank):
        collected = sampler.collect(replace(DRAW, dynamic=False, recover=False, prompts_per_round=per_round), source)
        assert [len(requests) // DRAW.group_size for requests in engine.requests] == draws
        assert len(collected.batch) == len(collected.sampled) == DRAW.groups
        assert [group.prompt.id for group in collected.batch] == [prompt.id for prompt in PromptSource(PROMPTS, 1).draw(4)]
        assert sampler.state.ledger == Ledger(drawn=4, trained=4)

    run(1, work)


def test_without_dynamic_sampling_failed_prompts_are_made_up_for():
    def work(sampler, source, engine, rank):
        collected = sampler.collect(replace(DRAW, dynamic=False, recover=False), source)
        ledger = sampler.state.ledger
        assert len(collected.batch) == DRAW.groups
        assert ledger.failed > 0
        assert ledger.drawn == ledger.trained + ledger.failed

    run(1, work, encode=lambda prompt: [1] * (9 if int(prompt.id[1:]) % 2 else 8))


@pytest.mark.parametrize(
    "change",
    [
        {"recover": False},
        {"recover": False, "dynamic": False},
        {"group_size": 2},
        {"max_prompt_tokens": 2},
        {"decoding": Decoding(max_new_tokens=0)},
    ],
    ids=["recovery off", "no dynamic sampling", "another group size", "shorter prompts", "shorter responses"],
)
def test_a_new_stage_expires_a_buffer_it_cannot_use(change):
    def work(sampler, source, engine, rank):
        step = 0
        while not sampler.state.buffer:
            sampler.collect(replace(DRAW, step=step), source)
            step += 1
        buffer, expired = sampler.state.buffer, sampler.state.ledger.expired
        assert sampler._recovered(replace(DRAW, step=step)) == buffer, "the same stage can use it"
        assert sampler.state.ledger.expired == expired
        sampler.state.buffer = buffer
        assert sampler._recovered(replace(DRAW, step=step, **change)) == []
        assert sampler.state.buffer == []
        assert sampler.state.ledger.expired == expired + len(buffer)
        assert sampler.state.ledger.pending() == 0

    run(1, work)


def test_seeds_differ_by_step_round_rank_and_run_and_repeat():
    def work(sampler, source, engine, rank):
        for step in range(4):
            sampler.collect(replace(DRAW, step=step), source)
        return engine.seeds

    first = run(3, work)
    every = [seed for seeds in first for seed in seeds]
    assert len(every) > 12, "more than one round must be exercised"
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**63 for seed in every)
    assert run(3, work) == first
    assert not set(every) & {seed for seeds in run(3, work, seed=6) for seed in seeds}
