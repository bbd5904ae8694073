"""Engine `vllm-server`: vLLM servers elsewhere (`python -m rollout.serve`), shared by all ranks, over HTTP.

Each rank asks all servers; rank 0 alone pushes the weights, to every server that answers. A version is proven output by output: a
server is told the version's name when it has all of the weights and has dropped its prefix cache, has none while it is being
changed, and says with each output which it was sampled from. Nothing else is believed: not what was sent, not what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from rollout.engine import Decoding, EngineError, Progress, Request, drain
from rollout.errors import InputError
from rollout.types import Sample
from rollout.vllm.engine import Deadlines
from rollout.vllm.server_client import Call, Output, ServerClient, ServerFault, open_session
from rollout.vllm.server_fleet import PROBE_SECONDS, Fleet, Server
from rollout.weights.push import Sender
from rollout.weights.source import WeightSource

Result = TypeVar("Result")


class ServerEngine:
    """One a rank. With a sender over shared memory or CUDA IPC the servers run on rank 0's host, as its user; with one over a
    broadcast they may be anywhere.

    urls: base addresses of all servers, the same on every rank. version_prefix: the run's own, the same on every rank and another
    one in each process start, so that no server passes for one with this run's weights. sender: on rank 0, who pushes; the other
    ranks need none. concurrency: outputs that this rank has at one server at once; over all ranks no more than the server's
    --max-sequences, or those that wait there look silent. patience: seconds to ask on where no server is left. max_tokens: of the
    longest prompt and response together, for `ready` to compare with each server's --max-model-len; None: it does not.
    api_key_env: the environment variable with the servers' key; unset or empty: none is sent. note: told, in the caller's thread
    and once, when a server is marked, and why.

    Raises InputError for an address or a key that cannot be one.
    """

    name = "vllm-server"
    streams = True

    def __init__(
        self,
        urls: Sequence[str],
        *,
        rank: int,
        version_prefix: str,
        end_token_ids: Sequence[int],
        sender: Sender | None = None,
        deadlines: Deadlines | None = None,
        concurrency: int = 256,
        patience: float = 60.0,
        max_tokens: int | None = None,
        api_key_env: str = "KEJU_API_KEY",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        if rank == 0 and sender is None:
            raise ValueError("rank 0 pushes the weights and needs a sender")
        addresses, key = _addresses(urls), _key(api_key_env)
        self._rank, self._prefix, self._sender, self._note = rank, version_prefix, sender, note
        self._end_token_ids = sorted(set(end_token_ids))
        self._deadlines = deadlines or Deadlines()
        self._max_tokens = max_tokens
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._version: int | None = None
        self._generation: ServerGeneration | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="keju-servers", daemon=True)
        self._thread.start()

        async def connect() -> None:
            self._session = open_session(key)
            clients = [ServerClient(url, self._session, self._deadlines.silence) for url in addresses]
            self._fleet = Fleet(clients, rank, concurrency, patience, self._said.put)

        self._wait_for(connect())

    @property
    def version(self) -> int | None:
        return self._version

    def ready(self) -> None:
        """See `rollout.engine.Engine.ready`: one server is enough. EngineError also where one would cut the longest output."""
        answering = self._wait_for(self._fleet.wait(self._deadlines.start))
        if self._max_tokens is not None:
            self._wait_for(self._fleet.check_lengths(answering, self._max_tokens))

    def load(self, version: int, source: WeightSource) -> None:
        """See `rollout.engine.Engine.load`. On rank 0 at least one server must take the weights; the others are marked until a
        later push reaches them. The other ranks believe all servers to have them, until `keep` or a server says otherwise."""
        self._version = None
        self._end_generation()
        self._wait_for(self._fleet.forget())
        if self._rank == 0:
            self._push(version, source)
        else:
            for _ in source:
                pass
            self._wait_for(self._fleet.hold(self._fleet.servers, self._weights(version)))
        self._version = version

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> ServerGeneration:
        """See `rollout.engine.Engine.submit`."""
        self._known_version()
        self._end_generation()
        self._wait_for(self._fleet.begin())
        self._generation = ServerGeneration(self, requests, decoding, progress)
        return self._generation

    @property
    def places(self) -> int:
        """See `rollout.engine.Several`."""
        return len(self._fleet.servers)

    def sample_each(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, list[Sample]]:
        """See `rollout.engine.Several`. A server that took the weights and samples nothing is marked, as by a failed push."""
        version = self._known_version()
        if self._rank != 0:
            return {}
        self._end_generation()
        calls = [Call.of(request, decoding, self._end_token_ids, self._weights(version)) for request in requests]
        outputs = self._wait_for(self._fleet.sample_each(calls))
        self._tell()
        return {url: [_sample(output, version) for output in each] for url, each in outputs.items()}

    def keep(self, names: Collection[str]) -> None:
        """See `rollout.engine.Several`."""
        self._wait_for(self._fleet.keep(names))

    def generate(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> list[Sample]:
        """All at once, in order."""
        return drain(self.submit(requests, decoding, progress), len(requests))

    def sleep(self) -> None:
        """Nothing: the servers' devices are not the trainer's."""

    def restart(self) -> None:
        """See `rollout.engine.Engine.restart`: forgets every mark and waits until a server answers. The servers are not ours to
        start, and where each cut or refused what was asked, they would again: EngineError."""
        if all(server.final for server in self._fleet.servers):
            raise self._fleet.error("every server cut or refused an output")
        self._version = None
        self._end_generation()
        self._wait_for(self._fleet.forget())
        self.ready()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._version = None
        self._end_generation()
        self._wait_for(self._fleet.settle())
        self._wait_for(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._sender is not None:
            self._sender.close()

    def _known_version(self) -> int:
        if self._version is None:
            raise EngineError("vllm-server: the servers' weights are of no known version; a push must come first")
        return self._version

    def _weights(self, version: int) -> str:
        """What a server with this version calls its weights. A fresh one says "default"."""
        return f"{self._prefix}:{version}"

    def _push(self, version: int, source: WeightSource) -> None:
        assert self._sender is not None
        answering = self._wait_for(self._fleet.probe(min(PROBE_SECONDS, self._deadlines.sync)))
        receivers = {server.url: _Receiver(self, server) for server in answering}
        # Also to none: the other ranks gather every tensor with this one.
        errors = self._sender.send(version, source, list(receivers.values()))
        for server in answering:
            if server.url in errors:
                server.last = str(errors[server.url]).removeprefix(f"{server.url}: ")
        done = [server for server in answering if server.url not in errors]
        self._wait_for(self._fleet.hold(done, self._weights(version)))
        if not done:
            raise self._fleet.error(f"no server took the weights of version {version}")
        for server in self._fleet.servers:
            if server not in done:
                self._said.put(f"{server.url}: has not got version {version}, serves again after a push: {server.last}")
        self._tell()

    def _end_generation(self) -> None:
        if self._generation is not None:
            self._generation.abort()
            self._generation = None

    def _tell(self) -> None:
        """Passes on what was said in the other thread."""
        while not self._said.empty():
            self._note(self._said.get())

    def _wait_for(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs it in the loop's thread; its result or exception here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


class ServerGeneration:
    """`rollout.engine.Generation`."""

    def __init__(self, engine: ServerEngine, requests: Sequence[Request], decoding: Decoding, progress: Progress | None) -> None:
        self._engine, self._decoding, self._progress = engine, decoding, progress
        assert engine.version is not None
        self._version: int = engine.version
        self._weights = engine._weights(self._version)
        self._finished: queue.SimpleQueue[tuple[int, Sample] | EngineError] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._submitted = 0
        self._left: set[int] = set()
        self._sampled = self._reported = 0  # tokens
        self._error: EngineError | None = None
        self.add(requests)

    @property
    def done(self) -> bool:
        return not self._left

    def add(self, requests: Sequence[Request]) -> None:
        if self._error is not None:
            raise self._error
        calls = []
        for request in requests:
            call = Call.of(request, self._decoding, self._engine._end_token_ids, self._weights)
            calls.append((self._submitted, call, len(request.prompt_token_ids) + self._decoding.max_new_tokens))
            self._left.add(self._submitted)
            self._submitted += 1
        self._engine._loop.call_soon_threadsafe(self._start, calls)

    def poll(self, seconds: float) -> list[tuple[int, Sample]]:
        deadline = time.monotonic() + seconds
        finished: list[tuple[int, Sample]] = []
        while self._left and self._error is None:
            # What has come already is taken without waiting; for the first sample there is patience.
            try:
                item = self._finished.get(timeout=0.0 if finished else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(item, EngineError):
                self._error = item
            else:
                self._left.remove(item[0])
                finished.append(item)
        self._report(len(finished))
        self._engine._tell()
        if self._error is not None and not finished:
            self._cancel()
            raise self._error
        return finished

    def abort(self) -> None:
        self._cancel()
        self._left.clear()
        self._engine._tell()

    def _cancel(self) -> None:
        """Returns when every connection is closed; the servers then stop by themselves."""

        async def cancel() -> None:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._engine._wait_for(cancel())

    def _start(self, calls: Sequence[tuple[int, Call, int]]) -> None:
        """In the loop's thread."""
        for place, call, cost in calls:
            task = self._engine._loop.create_task(self._work(place, call, cost))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, place: int, call: Call, cost: int) -> None:
        try:
            output = await self._engine._fleet.sample(call, cost, self._count)
            self._finished.put((place, _sample(output, self._version)))
        except EngineError as error:
            self._finished.put(error)
        except Exception as error:
            # A defect of ours: in this thread no one would see it, and the output would be awaited for ever.
            self._finished.put(EngineError(f"vllm-server: output {place}: {type(error).__name__}: {error}"))

    def _count(self, tokens: int) -> None:
        self._sampled += tokens

    def _report(self, outputs: int) -> None:
        sampled = self._sampled
        if self._progress is not None and (outputs or sampled > self._reported):
            self._progress(outputs, sampled - self._reported)
        self._reported = sampled


class _Receiver:
    """`rollout.weights.push.Receiver`, called from a thread of its own. The server stays paused, and without a version, from
    `begin` until everything else of `commit` was done: what samples in an open update, or after a failed one, dies of it."""

    def __init__(self, engine: ServerEngine, server: Server) -> None:
        self._engine, self._server, self._seconds = engine, server, engine._deadlines.sync
        self.name = server.url
        self.identity = (server.url, server.instance)

    @property
    def workers(self) -> int:
        return self._ask("GET", "/get_world_size")["world_size"]

    def begin(self, version: int, manifest: list[dict[str, Any]]) -> None:
        self._post("/pause?mode=abort&clear_cache=true")
        self._post("/update_weight_version", {"new_version": f"{self._engine._weights(version)}:incomplete"})
        self._start_update()
        self._post("/update_weights", {"update_info": {"manifest": manifest}})

    def _start_update(self) -> None:
        """vLLM leaves an update open whose broadcast could not be joined, or that it would not finish, and then begins no other:
        a chunk that it refuses ends that one."""
        try:
            self._post("/start_weight_update")
        except EngineError as error:
            if not (isinstance(error.__cause__, ServerFault) and error.__cause__.answered):
                raise
            with contextlib.suppress(EngineError):
                self.chunk({"abandon": "an update before it did not end"})
            self._post("/start_weight_update")

    def connect(self, info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": info})

    def chunk(self, chunk: dict[str, Any]) -> None:
        self._post("/update_weights", {"update_info": {"chunk": chunk}})

    def commit(self, version: int) -> None:
        weights = self._engine._weights(version)
        self._post("/finish_weight_update", {})
        if self._post("/reset_prefix_cache").get("success") is not True:
            raise EngineError(f"{self.name}: the prefix cache could not be dropped")
        self._post("/update_weight_version", {"new_version": weights})
        self._post("/resume")
        if (held := self._ask("GET", "/weight_info").get("weight_version")) != weights:
            raise EngineError(f"{self.name}: says after the push that it holds {held!r}, not {weights!r}")

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return self._engine._wait_for(self._server.client.call(method, path, self._seconds, body))
        except ServerFault as fault:
            raise EngineError(f"{self.name}: {fault}") from fault


def _sample(output: Output, version: int) -> Sample:
    token_ids, logprobs = output.arrays()
    return Sample(token_ids, logprobs, output.finish_reason, version)


def _addresses(urls: Sequence[str]) -> list[str]:
    """Without their last slashes. Raises InputError."""
    addresses = [url.rstrip("/") for url in urls]
    if not addresses:
        raise InputError("engine.servers: is empty; name at least one, such as http://127.0.0.1:8000")
    for url in addresses:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            shown = url.rpartition("@")[2]  # what stands before it may be a password
            raise InputError(f"engine.servers: {shown!r} is no base address; write it as http://127.0.0.1:8000")
        if addresses.count(url) > 1:
            raise InputError(f"engine.servers: {url} is named twice; name each server once")
    return addresses


def _key(variable: str) -> str | None:
    """Raises InputError, which never holds the key."""
    key = os.environ.get(variable, "")
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"{variable}: holds characters other than printable ASCII, or a blank; set another key")
    return key or None
