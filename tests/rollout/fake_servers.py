"""Scripted servers that speak vLLM's routes as far as `rollout.vllm.server_engine` uses them, on 127.0.0.1, in this process.

What a fake samples follows from the prompt and the seed alone, so that a test knows each output whichever server gave it.
Behind them: an engine over such servers, and what its tests ask of every generation.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from aiohttp import web

from rollout.engine import Decoding, Request
from rollout.types import Sample
from rollout.vllm.engine import Deadlines
from rollout.vllm.server_engine import ServerEngine
from rollout.weights.push import Sender
from rollout.weights.source import TensorMeta
from tests.rollout.loop_server import LoopServer

EVENT_TOKENS = 4
KEY_ENV = "KEJU_TEST_KEY"
TOKENS = 24
DECODING = Decoding(TOKENS)


def expected_tokens(prompt: list[int], seed: int | None, count: int) -> list[int]:
    return np.random.default_rng([*prompt, seed or 0]).integers(0, 1000, count).tolist()


def is_of(sample: Sample, request: Request, count: int) -> bool:
    """Whether this is what any fake samples for the request."""
    tokens = expected_tokens(request.prompt_token_ids.tolist(), request.seed, count)
    return sample.token_ids.tolist() == tokens and np.allclose(sample.logprobs, [-token / 1000 for token in tokens])


def free_port() -> int:
    """Where nothing listens: connections are refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class FakeServer(LoopServer):
    """key: demanded where set. Everything else may be changed while it runs.

    fail: path → what becomes of a call to it: an HTTP status, the body of a proxy's 502, "silent" (never answers), "cut" (closes
    the connection) or an address (redirects there); "cache" → the prefix cache is not dropped. wrong_spans: what the last event
    of an output says about weights, instead of the truth.
    """

    key: str | None = None
    port: int = 0
    fail: dict[str, int | str | bytes] = field(default_factory=dict)
    wrong_spans: Any = ...
    finish_reason: str = "length"
    short_by: int = 0
    max_model_len: int | None = None
    """As /v1/models gives it; not enforced."""
    off: float = 0.0
    """Nats by which the log-probabilities are wrong."""
    keeps_cache: bool = False
    """Says that its prefix cache was dropped, and does not: a prompt that it knows is continued from the weights of then, and its
    log-probabilities are wrong."""
    cached: dict[tuple[int, ...], str] = field(default_factory=dict)
    """Prompt → the weights that it was first computed with."""
    weights: str = "default"
    paused: bool = False
    updating: bool = False
    """As vLLM: between /start_weight_update and the end of the update or a chunk that is refused."""
    calls: list[str] = field(default_factory=list)
    """Every call's path but the questions for its version and model, in order."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Body of every output asked for."""
    at_once: int = 0
    most_at_once: int = 0
    finished: int = 0
    disconnected: int = 0
    seen_keys: set[str | None] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Outputs stop after their first event, until `release`."""
        self._on_loop(self._gate.clear)

    def release(self) -> None:
        self._on_loop(self._gate.set)

    def wait_until(self, holds: Callable[[FakeServer], bool], seconds: float = 30.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: holds(self), seconds), f"{self.url}: {holds} did not come within {seconds} s"

    def start_again(self) -> FakeServer:
        """A new process at the same address: it knows nothing."""
        self.weights, self.paused, self.updating, self.at_once = "default", False, False, 0
        self.fail.clear()
        self.cached.clear()
        return self.start()

    def _on_loop(self, call: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (call(), done.set()))
        assert done.wait(30)

    async def _listen(self) -> None:
        self._gate, self._streams = asyncio.Event(), set()
        self._gate.set()
        app = web.Application(middlewares=[self._first])
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/reset_prefix_cache", self._reset)
        app.router.add_post("/update_weight_version", self._name)
        for path in ("/pause", "/resume", "/start_weight_update", "/update_weights", "/finish_weight_update"):
            app.router.add_post(path, self._done)
        self._runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        for transport in list(self._streams):
            transport.abort()
        await self._runner.cleanup()

    @web.middleware
    async def _first(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        with self.changed:
            self.seen_keys.add(given)
            if request.path not in ("/weight_info", "/v1/models"):
                self.calls.append(request.path)
            self.changed.notify_all()
        if self.key is not None and given != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "the key is missing or wrong"}}, status=401)
        how = self.fail.get(request.path)
        if how == "silent":
            await asyncio.sleep(3600)
        if how == "cut":
            request.transport.abort()
        if isinstance(how, str) and how.startswith("http"):
            raise web.HTTPTemporaryRedirect(how)
        if how is not None and request.path == "/update_weights":
            self.updating = False
        if isinstance(how, bytes):
            return web.Response(status=502, body=how, content_type="text/html")
        if isinstance(how, int):
            return web.json_response({"error": {"message": "scripted failure"}}, status=how)
        return await handler(request)

    async def _weight_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weights})

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "model", "max_model_len": self.max_model_len}]})

    async def _done(self, request: web.Request) -> web.Response:
        if request.path in ("/pause", "/resume"):
            self.paused = request.path == "/pause"
        elif not self.paused:
            return web.json_response({"error": {"message": "an update while outputs are sampled"}}, status=500)
        elif (request.path == "/start_weight_update") == self.updating:
            return web.json_response({"error": {"message": "an update is open, or none is"}}, status=500)
        elif request.path == "/update_weights":
            if "abandon" in (await request.json())["update_info"].get("chunk", ()):
                self.updating = False
                return web.json_response({"error": {"message": "the push was given up"}}, status=500)
        else:
            self.updating = request.path == "/start_weight_update"
        return web.json_response({})

    async def _reset(self, _request: web.Request) -> web.Response:
        if not self.keeps_cache:
            self.cached.clear()
        return web.json_response({"success": self.fail.get("cache") is None})

    async def _name(self, request: web.Request) -> web.Response:
        self.weights = (await request.json())["new_version"]
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        parameters = body["sampling_params"]
        tokens = expected_tokens(body["token_ids"], parameters["seed"], parameters["max_tokens"] - self.short_by)
        weights = self.weights
        computed = self.cached.setdefault(tuple(body["token_ids"]), weights)
        off = self.off + (computed != weights)
        self._count(1, body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self._streams.add(request.transport)
        whole = False
        try:
            await response.prepare(request)
            for start in range(0, len(tokens), EVENT_TOKENS):
                await response.write(self._event(tokens, start, weights, off))
                await self._gate.wait()
            whole = True  # whoever reads the next line may close at once
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.finished += whole
            self.disconnected += not whole
            self._streams.discard(request.transport)
            self._count(-1)
        return response

    def _event(self, tokens: list[int], start: int, weights: str, off: float) -> bytes:
        part, last = tokens[start : start + EVENT_TOKENS], start + EVENT_TOKENS >= len(tokens)
        spans: Any = [{"version": weights, "start": 0, "end": len(tokens)}]
        if self.wrong_spans is not ...:
            spans = self.wrong_spans
        content = [{"token_id": token, "logprob": -token / 1000 + off, "rank": 1} for token in part]
        choice = {
            "index": 0,
            "token_ids": part,
            "logprobs": {"content": content},
            "finish_reason": self.finish_reason if last else None,
            "weight_versions": spans if last else None,
        }
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    def _count(self, change: int, body: dict[str, Any] | None = None) -> None:
        with self.changed:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)
            if body is not None:
                self.requests.append(body)
            self.changed.notify_all()


@contextmanager
def fake_servers(count: int, **fields: Any) -> Iterator[list[FakeServer]]:
    servers = [FakeServer(**fields).start() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


class OneTensor:
    """A source; counts how often it was iterated to its end."""

    def __init__(self) -> None:
        self.passes = 0

    def metadata(self):
        return [TensorMeta("weight", torch.float32, (4,))]

    def __iter__(self):
        yield "weight", torch.zeros(4)
        self.passes += 1


@contextmanager
def engine_of(servers, *, rank: int = 0, load: bool = True, silence: float = 60.0, **settings):
    """notes: engine.notes."""
    notes: list[str] = []
    urls = [server if isinstance(server, str) else server.url for server in servers]
    settings = {"patience": 20.0, "api_key_env": KEY_ENV, "version_prefix": "run"} | settings
    sender = Sender(torch.float32, "engine", 1) if rank == 0 else None
    deadlines = Deadlines(start=20, silence=silence, sync=20)
    engine = ServerEngine(urls, rank=rank, end_token_ids=[999], sender=sender, deadlines=deadlines, note=notes.append, **settings)
    engine.notes = notes
    try:
        if load:
            engine.load(1, OneTensor())
        yield engine
    finally:
        engine.close()


def requests_of(count: int, length: int = 5) -> list[Request]:
    return [Request(np.arange(place, place + length, dtype=np.int32), seed=place) for place in range(count)]


def collect(generation, seconds: float = 60.0) -> dict[int, object]:
    """Place → sample; a place that comes twice fails."""
    samples: dict[int, object] = {}
    deadline = time.monotonic() + seconds
    while not generation.done:
        assert time.monotonic() < deadline, f"{len(samples)} samples within {seconds} s"
        for place, sample in generation.poll(0.5):
            assert place not in samples
            samples[place] = sample
    return samples


def check_all(samples, requests, version: int = 1) -> None:
    assert sorted(samples) == list(range(len(requests)))
    for place, request in enumerate(requests):
        assert is_of(samples[place], request, TOKENS), place
        assert samples[place].weight_version == version
        assert samples[place].finish_reason == "length"
