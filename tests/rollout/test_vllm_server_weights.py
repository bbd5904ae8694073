"""Engine `vllm-server` against scripted servers: what it pushes, to whom, and which outputs it believes to be of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from rollout.engine import EngineError
from rollout.ranks import Ranks
from rollout.weights.source import TensorMeta
from rollout.weights.sync import Probe, WeightSync
from tests.rollout.fake_servers import (
    DECODING,
    TOKENS,
    OneTensor,
    check_all,
    collect,
    engine_of,
    fake_servers,
    requests_of,
)
from tests.rollout.test_sampler import ThreadRanks

pytestmark = pytest.mark.timeout(300)


# Versions

WRONG = {
    "another version": [{"version": "run:0", "start": 0, "end": TOKENS}],
    "another run": [{"version": "other:1", "start": 0, "end": TOKENS}],
    "a fresh server": [{"version": "default", "start": 0, "end": TOKENS}],
    "none": None,
    "an empty one": [],
    "two": [{"version": "run:0", "start": 0, "end": 3}, {"version": "run:1", "start": 3, "end": TOKENS}],
    "the last tokens'": [{"version": "run:1", "start": 3, "end": TOKENS}],
    "the first tokens'": [{"version": "run:1", "start": 0, "end": TOKENS - 1}],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_output_is_refused_unless_all_of_it_is_of_the_version(wrong):
    requests = requests_of(12)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        bad.wrong_spans = WRONG[wrong]
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert bad.requests
        assert len(good.requests) == 12
        assert len(engine.notes) == 1
        assert "weights" in engine.notes[0]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_server_with_other_weights_is_not_asked_again_even_if_it_is_the_last(wrong):
    with fake_servers(1) as [server], engine_of([server], patience=60.0) as engine:
        server.wrong_spans = WRONG[wrong]
        with pytest.raises(EngineError, match=server.url):
            collect(engine.submit(requests_of(3), DECODING), seconds=30)
        assert len(server.requests) <= 3


def test_a_server_that_started_anew_samples_nothing_until_it_has_the_weights():
    requests = requests_of(12)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        bad.stop()
        bad.start_again()
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert not bad.requests
        assert "'default'" in engine.notes[0]
        engine.load(2, OneTensor())
        assert bad.weights == "run:2"
        check_all(collect(engine.submit(requests, DECODING)), requests, version=2)
        assert bad.requests


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"finish_reason": "abort"}, "'abort'"),
        ({"short_by": 3}, "max-model-len"),
        ({"short_by": TOKENS}, ""),
    ],
)
def test_an_output_that_is_not_whole_is_refused(change, why):
    requests = requests_of(6)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        for name, value in change.items():
            setattr(bad, name, value)
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert len(engine.notes) == 1
        assert why in engine.notes[0]


# Pushes


def test_a_push_stops_renames_fills_clears_names_and_only_then_resumes():
    with fake_servers(1) as [server], engine_of([server]):
        assert server.calls == [
            "/pause",
            "/update_weight_version",
            "/start_weight_update",
            "/update_weights",
            "/update_weights",
            "/finish_weight_update",
            "/reset_prefix_cache",
            "/update_weight_version",
            "/resume",
        ]
        assert server.weights == "run:1"


@pytest.mark.parametrize(
    "at",
    ["/pause", "/update_weight_version", "/start_weight_update", "/update_weights", "/finish_weight_update",
     "/reset_prefix_cache", "cache", "/resume"],
)  # fmt: skip
@pytest.mark.parametrize("how", [500, "cut"])
def test_a_server_whose_push_failed_serves_again_only_after_one_that_succeeds(at, how):
    requests = requests_of(12)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        bad.fail[at] = how
        engine.load(2, OneTensor())
        assert engine.version == 2
        assert len(engine.notes) == 1
        assert bad.url in engine.notes[0]
        bad.fail.clear()
        check_all(collect(engine.submit(requests, DECODING)), requests, version=2)
        assert not bad.requests
        with engine_of([good, bad], rank=1, load=False) as other:
            other.load(2, OneTensor())
            check_all(collect(other.submit(requests, DECODING)), requests, version=2)
            # Where only /resume failed, the weights are there, but it still waits.
            assert not bad.requests or at == "/resume"
        engine.load(3, OneTensor())
        assert bad.weights == "run:3"
        assert not bad.paused
        bad.requests.clear()
        check_all(collect(engine.submit(requests, DECODING)), requests, version=3)
        assert bad.requests


def test_a_push_reaches_at_least_one_server_or_fails_naming_each():
    source = OneTensor()
    with fake_servers(2) as servers, engine_of(servers) as engine:
        servers[0].stop()
        servers[1].fail["/update_weights"] = 500
        with pytest.raises(EngineError) as raised:
            engine.load(2, source)
        assert all(f"{server.url}: " in str(raised.value) for server in servers)
        assert source.passes == 1, "the other ranks gather with this one"
        assert engine.version is None
        with pytest.raises(EngineError, match="push must come first"):
            engine.submit(requests_of(1), DECODING)
        servers[1].stop()
        with pytest.raises(EngineError):
            engine.load(2, source)
        assert source.passes == 2
        servers[0].start_again()
        engine.restart()
        engine.load(3, source)
        check_all(collect(engine.submit(requests_of(4), DECODING)), requests_of(4), version=3)


def test_a_server_that_comes_back_gets_the_weights_before_it_serves():
    requests = requests_of(12)
    with fake_servers(2) as [good, bad]:
        bad.stop()
        with engine_of([good, bad]) as engine:
            assert bad.url in engine.notes[0]
            check_all(collect(engine.submit(requests, DECODING)), requests)
            bad.start_again()
            check_all(collect(engine.submit(requests, DECODING)), requests)
            assert not bad.requests
            engine.load(2, OneTensor())
            check_all(collect(engine.submit(requests, DECODING)), requests, version=2)
            assert bad.requests


def test_the_other_ranks_iterate_and_do_not_push():
    with fake_servers(1) as [server], engine_of([server]) as pusher:
        before, source = list(server.calls), OneTensor()
        with engine_of([server], rank=1, load=False) as engine:
            engine.load(1, source)
            assert source.passes == 1
            assert server.calls == before
            check_all(collect(engine.submit(requests_of(3), DECODING)), requests_of(3))
        assert pusher.version == 1


def test_a_source_that_announces_other_tensors_is_an_error_of_its_own():
    class Lying(OneTensor):
        def metadata(self):
            return [TensorMeta("other", torch.float32, (4,))]

    with fake_servers(1) as [server], engine_of([server]) as engine:
        with pytest.raises(ValueError, match="other"):
            engine.load(2, Lying())
        assert engine.version is None
        assert server.weights == "run:2:incomplete"


# Probes


@contextmanager
def sync_of(servers, ranks=Ranks(), **settings):  # noqa: B008 - frozen
    """scored: how many sequences each probe gave the policy to score, which agrees with an honest fake."""
    scored: list[int] = []

    def score(prompts, responses):
        scored.append(len(prompts))
        return [-tokens.astype(np.float32) / 1000 for tokens in responses]

    with engine_of(servers, load=False, **settings) as engine:
        sync = WeightSync(engine, OneTensor(), ranks, score=score, probe=Probe(np.arange(5, dtype=np.int32), bound=0.01))
        sync.scored, sync.engine = scored, engine
        yield sync


def test_every_server_continues_both_copies_of_the_probe():
    with fake_servers(3) as servers, sync_of(servers) as sync:
        sync.push(1)
        assert [[body["sampling_params"]["seed"] for body in server.requests] for server in servers] == [[0, 1]] * 3
        assert sync.worst < 1e-6
        with sync_of(servers, rank=1) as other:
            other.push(1)
            assert other.scored == sync.scored == [6], "a collective: every rank scores as many"
            assert all(len(server.requests) == 2 for server in servers), "the rank that pushes proves"


@pytest.mark.parametrize("place", range(3))
def test_a_push_fails_where_one_server_has_wrong_logprobs_and_names_it(place):
    with fake_servers(3) as servers, sync_of(servers) as sync:
        servers[place].off = 0.02
        with pytest.raises(EngineError, match=r"off the policy's by 0\.02") as raised:
            sync.push(1)
        assert [server.url in str(raised.value) for server in servers] == [number == place for number in range(3)]
        assert sync.worst == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("place", range(3))
def test_a_push_fails_where_one_servers_prefix_cache_outlived_it(place):
    with fake_servers(3) as servers, sync_of(servers) as sync:
        servers[place].keeps_cache = True
        sync.push(1)
        with pytest.raises(EngineError, match=f"{servers[place].url}: the engine's log-probabilities are off"):
            sync.push(2)


def test_a_server_that_does_not_answer_the_probe_gets_no_outputs_until_a_push():
    requests = requests_of(12)
    with fake_servers(3) as servers, sync_of(servers) as sync:
        servers[2].fail["/inference/v1/generate"] = 500
        sync.push(1)
        assert sync.repeats == 0
        assert [note.partition(": ")[0] for note in sync.engine.notes] == [servers[2].url]
        servers[2].fail.clear()
        check_all(collect(sync.engine.submit(requests, DECODING)), requests)
        assert not servers[2].requests
        sync.push(2)
        check_all(collect(sync.engine.submit(requests, DECODING)), requests, version=2)
        assert len(servers[2].requests) > 2


class Threads(ThreadRanks):
    board = None
    all_gather = ThreadRanks._exchange


def test_the_other_ranks_ask_only_the_servers_that_proved_the_weights():
    requests, barrier, mailbox = requests_of(12), threading.Barrier(2), [None, None]
    ranks = [Threads(rank, 2, barrier, mailbox) for rank in range(2)]
    with (
        fake_servers(3) as servers,
        sync_of(servers, ranks[0]) as first,
        sync_of(servers, ranks[1], rank=1) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        servers[1].fail["/inference/v1/generate"] = 500  # rank 1's own first
        list(pool.map(lambda sync: sync.push(1), (first, second)))
        servers[1].fail.clear()  # nothing but the probe has said that it is not well
        check_all(collect(second.engine.submit(requests, DECODING)), requests)
        assert not servers[1].requests
        for server in (servers[0], servers[2]):
            server.stop()
        with pytest.raises(EngineError, match=f"{servers[1].url}: did not prove"):
            second.engine.generate(requests, DECODING)
        for server in (servers[0], servers[2]):
            server.start_again()
        list(pool.map(lambda sync: sync.push(2), (first, second)))
        probed = len(servers[1].requests)
        check_all(collect(second.engine.submit(requests, DECODING)), requests, version=2)
        assert len(servers[1].requests) > probed


def test_a_push_that_no_server_can_prove_fails_and_names_each():
    with fake_servers(2) as servers, sync_of(servers, patience=0.5) as sync:
        for server in servers:
            server.fail["/inference/v1/generate"] = 500
        with pytest.raises(EngineError, match="HTTP 500") as raised:
            sync.push(1)
        assert all(server.url in str(raised.value) for server in servers)
