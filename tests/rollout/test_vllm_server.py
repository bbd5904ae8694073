"""Engine `vllm-server` against scripted servers: nothing is lost, doubled or of other weights, whatever a server does."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from rollout.engine import Decoding, EngineError, Request
from rollout.errors import InputError
from rollout.vllm.engine import Deadlines
from rollout.vllm.server_engine import ServerEngine
from rollout.vllm.server_fleet import FIRST_PAUSE, LONGEST_PAUSE, pauses
from tests.rollout.fake_servers import (
    DECODING,
    KEY_ENV,
    TOKENS,
    FakeServer,
    OneTensor,
    check_all,
    collect,
    engine_of,
    fake_servers,
    free_port,
    requests_of,
)

pytestmark = pytest.mark.timeout(300)
KEY = "correct-horse-battery"
GENERATE = "/inference/v1/generate"


# Outputs


def test_every_output_comes_once_in_its_place_and_more_can_be_added():
    requests = requests_of(40)
    progress: list[tuple[int, int]] = []
    with fake_servers(2) as servers, engine_of(servers) as engine:
        generation = engine.submit(requests[:30], DECODING, lambda *counts: progress.append(counts))
        generation.add(requests[30:])
        check_all(collect(generation), requests)
        assert sum(outputs for outputs, _ in progress) == 40
        assert sum(tokens for _, tokens in progress) == 40 * TOKENS
        assert not engine.notes
        assert all(server.requests for server in servers)


def test_a_request_says_how_to_sample():
    with fake_servers(1) as [server], engine_of([server]) as engine:
        engine.generate([Request(np.arange(3, dtype=np.int32), seed=2**62)], Decoding(TOKENS, temperature=0.7, top_p=0.9))
        engine.generate(
            [Request(np.arange(3, dtype=np.int32), seed=5)], Decoding(TOKENS, greedy=True, temperature=0.7, top_p=0.9)
        )
        sampled, greedy = (body["sampling_params"] for body in server.requests)
        assert server.requests[0]["token_ids"] == [0, 1, 2]
        assert sampled["seed"] == 2**62
        assert (sampled["temperature"], sampled["top_p"], sampled["stop_token_ids"]) == (0.7, 0.9, [999])
        assert (greedy["temperature"], greedy["top_p"], greedy["seed"]) == (0.0, 1.0, None)
        assert sampled["ignore_eos"], "an end token of the server's own would end outputs that the trainer's do not"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_outputs_go_to_the_server_with_the_fewest_tokens_outstanding_from_the_ranks_own_on(rank):
    with fake_servers(2) as servers, engine_of(servers), engine_of(servers, rank=rank) as engine:
        for server in servers:
            server.hold()
        generation = engine.submit(requests_of(1, length=500) + requests_of(4, length=10), DECODING)
        own, other = servers[rank % 2], servers[1 - rank % 2]
        other.wait_until(lambda server: len(server.requests) == 4)
        own.wait_until(lambda server: len(server.requests) == 1)
        assert len(own.requests[0]["token_ids"]) == 500
        for server in servers:
            server.release()
        assert len(collect(generation)) == 5


def test_a_server_gets_no_more_outputs_at_once_than_it_may():
    requests = requests_of(12)
    with fake_servers(1) as [server], engine_of([server], concurrency=3) as engine:
        server.hold()
        generation = engine.submit(requests, DECODING)
        server.wait_until(lambda server: server.at_once == 3)
        server.release()
        check_all(collect(generation), requests)
        assert server.most_at_once == 3


# Servers that fail


@pytest.mark.parametrize("how", [500, 503, 400, "cut", "silent"])
def test_a_server_that_fails_is_marked_once_and_its_outputs_come_from_another(how):
    requests = requests_of(20)
    with fake_servers(2) as [good, bad], engine_of([good, bad], silence=4 if how == "silent" else 60) as engine:
        bad.fail[GENERATE] = how
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert bad.calls.count(GENERATE) > 0
        assert len(engine.notes) == 1, engine.notes
        assert engine.notes[0].startswith(bad.url)
        assert str(how) in engine.notes[0] or how == "cut"
        bad.fail.clear()
        asked = bad.calls.count(GENERATE)
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert bad.calls.count(GENERATE) == asked, "a marked server serves again only after a push"
        engine.load(2, OneTensor())
        check_all(collect(engine.submit(requests, DECODING)), requests, version=2)
        assert bad.calls.count(GENERATE) > asked


def test_a_server_that_falls_silent_in_the_middle_of_its_outputs_loses_them():
    requests = requests_of(20)
    with fake_servers(2) as [good, bad], engine_of([good, bad], silence=4) as engine:
        bad.hold()
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert len(engine.notes) == 1
        assert "silent for 4 s" in engine.notes[0]
        bad.release()


def test_a_server_that_is_slow_and_heard_keeps_its_outputs():
    """Its other outputs are signs of life for one that waits its turn."""
    with fake_servers(1) as [server], engine_of([server], silence=6) as engine:
        server.hold()
        generation = engine.submit(requests_of(1), DECODING)
        for count in range(1, 10):
            server.wait_until(lambda server, count=count: server.at_once == count)
            assert not generation.poll(1.0)
            generation.add([Request(np.arange(7, dtype=np.int32), seed=count)])
        server.release()
        assert len(collect(generation)) == 10
        assert not engine.notes


def test_a_server_is_not_blamed_for_the_time_that_this_process_slept():
    with fake_servers(1) as [server], engine_of([server], silence=4) as engine:
        server.hold()
        generation = engine.submit(requests_of(3), DECODING)
        server.wait_until(lambda server: server.at_once == 3)
        assert not generation.poll(0.2)
        engine._loop.call_soon_threadsafe(time.sleep, 5)
        server.release()
        check_all(collect(generation), requests_of(3))
        assert not engine.notes


def test_a_server_that_dies_in_the_middle_of_a_batch_takes_nothing_with_it():
    requests = requests_of(30)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        bad.hold()
        generation = engine.submit(requests, DECODING)
        bad.wait_until(lambda server: server.at_once == 15)
        bad.stop()
        check_all(collect(generation), requests)
        assert len(engine.notes) == 1
        assert bad.finished == 0


def test_a_server_that_refuses_connections_is_passed_over():
    requests = requests_of(20)
    with fake_servers(2) as [good, bad], engine_of([good, bad]) as engine:
        bad.stop()
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert len(engine.notes) == 1
        assert "Connect" in engine.notes[0]


def test_an_output_is_sent_again_after_growing_pauses_that_differ():
    for attempt, pause in enumerate(itertools.islice(pauses(), 12)):
        middle = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len({next(pauses()) for _ in range(8)}) > 1


def test_the_only_server_may_fail_for_a_while():
    requests = requests_of(10)
    with fake_servers(1) as [server], engine_of([server]) as engine:
        server.fail[GENERATE] = 500
        generation = engine.submit(requests, DECODING)
        server.wait_until(lambda server: server.calls.count(GENERATE) >= 10)
        server.fail.clear()
        check_all(collect(generation), requests)
        assert "answers again" in " ".join(engine.notes)


@pytest.mark.parametrize("how", ["dead", 500])
def test_where_no_server_is_left_the_error_names_each_and_why(how):
    with fake_servers(2) as servers, engine_of(servers, patience=1.0) as engine:
        for server in servers:
            server.stop() if how == "dead" else server.fail.update({GENERATE: how})
        generation = engine.submit(requests_of(10), DECODING)
        with pytest.raises(EngineError) as raised:
            collect(generation)
        for server in servers:
            assert f"{server.url}: " in str(raised.value)
        assert "\n" not in str(raised.value)
        assert ("Connect" if how == "dead" else "HTTP 500 scripted failure") in str(raised.value)
        with pytest.raises(EngineError):
            generation.poll(0.1)
        with pytest.raises(EngineError):
            generation.add(requests_of(1))
        generation.abort()
        assert generation.done


@pytest.mark.parametrize("change", [{"short_by": 3}, {"fail": {GENERATE: 400}}, {"fail": {GENERATE: 422}}])
@pytest.mark.parametrize("count", [1, 3])
def test_an_output_that_every_server_cuts_or_refuses_is_asked_of_each_once(change, count):
    with fake_servers(count) as servers, engine_of(servers, patience=60.0) as engine:
        for server in servers:
            for name, value in change.items():
                setattr(server, name, value)
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"max-model-len|HTTP 4\d\d scripted failure") as raised:
            collect(engine.submit(requests_of(1), DECODING), seconds=30)
        assert time.monotonic() - start < 15, "it does not go round"
        assert [server.calls.count(GENERATE) for server in servers] == [1] * count
        assert all(server.url in str(raised.value) for server in servers)
        with pytest.raises(EngineError, match=r"max-model-len|HTTP 4\d\d scripted failure"):
            engine.restart()  # or the run would go round


def test_one_output_that_is_cut_ends_the_generation_though_the_others_are_whole():
    class Cuts(FakeServer):
        async def _generate(self, request):
            self.short_by = 3 if len((await request.json())["token_ids"]) == 9 else 0
            return await super()._generate(request)

    server = Cuts().start()
    try:
        with engine_of([server], patience=60.0, concurrency=2) as engine:
            requests = [*requests_of(1, length=9), *requests_of(200)]
            with pytest.raises(EngineError, match="cut an output at 21 of 24 tokens; raise its --max-model-len"):
                collect(engine.submit(requests, DECODING), seconds=30)
            assert sum(len(body["token_ids"]) == 9 for body in server.requests) == 1
    finally:
        server.stop()


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_a_refusal_that_may_pass_is_waited_out(status):
    requests = requests_of(3)
    with fake_servers(1) as [server], engine_of([server]) as engine:
        server.fail[GENERATE] = status
        generation = engine.submit(requests, DECODING)
        server.wait_until(lambda server: server.calls.count(GENERATE) >= 5)
        server.fail.clear()
        check_all(collect(generation), requests)


def test_a_server_whose_context_is_too_short_is_refused_before_it_samples():
    with fake_servers(3, max_model_len=64) as servers, engine_of(servers, load=False, max_tokens=64) as engine:
        engine.ready()
        servers[1].max_model_len = 63
        for refused in (engine.ready, engine.restart):
            with pytest.raises(EngineError) as raised:
                refused()
            assert str(raised.value) == (
                f"vllm-server: {servers[1].url}: its --max-model-len is 63: prompt and response take up to 64 tokens; "
                "start it with --max-model-len 64, or lower the limits"
            )
        servers[1].stop()
        engine.ready()
        servers[2].max_model_len = None
        engine.ready()
        servers[2].fail["/v1/models"] = 500
        engine.ready()


# Aborts and ends


def test_an_abort_closes_the_connections_and_nothing_of_it_arrives():
    with fake_servers(1) as [server], engine_of([server], concurrency=8) as engine:
        server.hold()
        generation = engine.submit(requests_of(20), DECODING)
        server.wait_until(lambda server: server.at_once == 8)
        generation.abort()
        assert generation.done
        assert generation.poll(0.0) == []
        server.wait_until(lambda server: server.disconnected == 8)
        server.release()
        requests = requests_of(5, length=9)
        check_all(collect(engine.submit(requests, DECODING)), requests)
        server.wait_until(lambda server: server.at_once == 0)
        assert server.finished == 5
        assert len(server.requests) == 8 + 5, "those that waited were never sent"


def test_a_load_ends_what_is_under_way():
    with fake_servers(1) as [server], engine_of([server]) as engine:
        server.hold()
        generation = engine.submit(requests_of(4), DECODING)
        server.wait_until(lambda server: server.at_once == 4)
        engine.load(2, OneTensor())
        assert generation.done
        server.wait_until(lambda server: server.disconnected == 4)


def test_ready_waits_for_one_server_and_names_all_where_none_comes():
    with fake_servers(1) as [server]:
        server.stop()
        with engine_of([server, f"http://127.0.0.1:{free_port()}"], load=False) as engine:
            waiting = threading.Thread(target=engine.ready)
            waiting.start()
            server.start_again()
            waiting.join(30)
            assert not waiting.is_alive()
    nowhere = f"http://127.0.0.1:{free_port()}"
    engine = ServerEngine(
        [nowhere, f"{nowhere}/b"], rank=1, version_prefix="run", end_token_ids=[], deadlines=Deadlines(start=0.5)
    )
    with pytest.raises(EngineError, match=f"{nowhere}: .*{nowhere}/b: "):
        engine.ready()
    with pytest.raises(EngineError):
        engine.restart()
    engine.close()
    engine.close()


def test_an_error_page_that_is_no_text_is_an_error_as_any():
    with fake_servers(1) as [server], engine_of([server], load=False, patience=0.5) as engine:
        server.fail["/weight_info"] = b"\xffber den Proxy"
        with pytest.raises(EngineError, match=r"no server took .*: /weight_info: HTTP 502 \ufffdber den Proxy"):
            engine.load(1, OneTensor())
        server.fail = {GENERATE: b"\xff"}
        engine.load(2, OneTensor())
        with pytest.raises(EngineError, match="HTTP 502"):
            collect(engine.submit(requests_of(2), DECODING))


# The key


def test_the_key_is_sent_and_never_said(monkeypatch, capfd):
    monkeypatch.setenv(KEY_ENV, KEY)
    requests = requests_of(6)
    with fake_servers(2, key=KEY) as servers, engine_of(servers, patience=0.5) as engine:
        check_all(collect(engine.submit(requests, DECODING)), requests)
        assert servers[0].seen_keys == {f"Bearer {KEY}"}
        servers[0].fail[GENERATE] = 500
        servers[1].key = "another"
        with pytest.raises(EngineError, match="401") as raised:
            collect(engine.submit(requests, DECODING))
        said = [str(raised.value), *engine.notes, repr(engine), *capfd.readouterr()]
        assert not any(KEY in text for text in said)


def test_the_key_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with fake_servers(2) as [server, elsewhere], engine_of([server], patience=0.5) as engine:
        server.fail[GENERATE] = f"{elsewhere.url}{GENERATE}"
        with pytest.raises(EngineError, match="307"):
            collect(engine.submit(requests_of(2), DECODING))
        assert not elsewhere.seen_keys


def test_a_wrong_key_is_said_at_once(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with fake_servers(1, key="another") as servers, engine_of(servers, load=False) as engine:
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"every server refuses: .*401"):
            engine.ready()
        assert time.monotonic() - start < 15


def test_addresses_and_keys_that_cannot_be_are_refused(monkeypatch):
    def build(*urls):
        ServerEngine(urls, rank=1, version_prefix="run", end_token_ids=[], api_key_env=KEY_ENV)

    for urls in ((), ("127.0.0.1:8000",), ("ftp://host",), ("http://",), ("http://host?x=1",), ("http://a", "http://a/")):
        with pytest.raises(InputError, match=r"engine\.servers"):
            build(*urls)
    with pytest.raises(InputError) as raised:
        build("http://user:password@host")
    assert "password" not in str(raised.value)
    monkeypatch.setenv(KEY_ENV, "two\nlines")
    with pytest.raises(InputError, match=KEY_ENV) as raised:
        build("http://host")
    assert "lines" not in str(raised.value)
