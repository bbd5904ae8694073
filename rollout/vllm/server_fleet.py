"""One rank's view of the servers: which of them hold the weights asked for, who takes the next output, and what becomes of it
when its server fails. Coroutines and callbacks of one event loop.

A server serves outputs while it is thought to hold the version and has not failed since. One that fails is marked until a push
succeeds on it, and its outputs go to others. Only where none is left, those whose weights are not in doubt are asked again with
growing pauses, for `patience` seconds; one that answers with the version serves on. One that cut an output, or refused it, is not
asked again: it would do the same to the same output, so that each server gets it once at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from rollout.engine import EngineError
from rollout.vllm.server_client import Call, Output, ServerClient, ServerFault

PROBE_SECONDS = 10.0
"""For a question that a living server answers at once."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between an output's attempts: doubled each time, and spread by half so that not all come back at once."""


@dataclass(slots=True, eq=False)
class Server:
    """holds: the version string it is thought to have; None: it gets no outputs until a push. fault: why it is marked; None: it
    is not. last: its last fault, marked or not. final: one since the last push was (`ServerFault`). outstanding: tokens, prompt
    and longest response, of the outputs it works on. pushed: the version string that the last push gave it; instance: counted up
    each time it reports another, because it was started anew or left in the middle of a push."""

    client: ServerClient
    holds: str | None = None
    fault: str | None = None
    last: str = "was not asked"
    final: bool = False
    outstanding: int = 0
    outputs: int = 0
    pushed: str | None = None
    instance: int = 0

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def usable(self) -> bool:
        return self.holds is not None and self.fault is None


class Fleet:
    """rank: so that ranks do not all begin with the same server. concurrency: outputs at one server at once, of this rank. say:
    told what someone should know, in the loop's thread."""

    def __init__(
        self, clients: Sequence[ServerClient], rank: int, concurrency: int, patience: float, say: Callable[[str], None]
    ) -> None:
        first = rank % len(clients)
        self.servers = [Server(client) for client in (*clients[first:], *clients[:first])]
        self._concurrency, self._patience, self._say = concurrency, patience, say
        self._waiting: deque[tuple[asyncio.Future[Server], int]] = deque()
        self._admission: asyncio.Task[None] | None = None
        self._rescue: asyncio.Task[None] | None = None
        self._alone_since: float | None = None
        """When the last usable server failed; None once an output was finished since."""
        self._lost: EngineError | None = None

    # weights

    async def probe(self, seconds: float) -> list[Server]:
        """Those that answer the question for their version; `last` of the others says why they do not."""
        faults = await asyncio.gather(*(self._asked(server, seconds) for server in self.servers))
        return [server for server, fault in zip(self.servers, faults, strict=True) if fault is None]

    async def wait(self, seconds: float) -> list[Server]:
        """Until one server answers; returns those that do. Raises EngineError where none does in time, or all refuse."""
        end = time.monotonic() + seconds
        for pause in pauses():
            left = end - time.monotonic()
            if left <= 0:
                raise self.error(f"no server answered within {seconds:g} s")
            faults = await asyncio.gather(*(self._asked(server, min(left, PROBE_SECONDS)) for server in self.servers))
            if None in faults:
                return [server for server, fault in zip(self.servers, faults, strict=True) if fault is None]
            if all(fault.refused for fault in faults):
                raise self.error("every server refuses")
            await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))
        raise AssertionError  # pauses() does not end

    async def check_lengths(self, servers: Sequence[Server], tokens: int) -> None:
        """Raises EngineError, naming them, where servers say that they end an output before `tokens` of prompt and response."""

        async def length(server: Server) -> int | None:
            with contextlib.suppress(ServerFault):  # one that fails now is found when it is needed
                return await server.client.max_model_len(PROBE_SECONDS)
            return None

        lengths = await asyncio.gather(*(length(server) for server in servers))
        short = [
            f"{server.url}: its --max-model-len is {taken}"
            for server, taken in zip(servers, lengths, strict=True)
            if taken is not None and taken < tokens
        ]
        if short:
            mend = f"prompt and response take up to {tokens} tokens; start it with --max-model-len {tokens}, or lower the limits"
            raise EngineError(f"vllm-server: {'; '.join(short)}: {mend}")

    async def forget(self) -> None:
        """No server holds anything; no mark stands."""
        await self.settle()
        for server in self.servers:
            server.holds, server.fault, server.final = None, None, False

    async def hold(self, servers: Sequence[Server], weights: str) -> None:
        """A push: these have the version, the others have not."""
        await self.settle()
        for server in self.servers:
            server.holds = weights if server in servers else None
            server.pushed = server.holds
            server.fault = None if server in servers else server.last

    async def keep(self, urls: Collection[str]) -> None:
        """Of those that hold the version: the others get no outputs until a push."""
        for server in self.servers:
            if server.holds is not None and server.url not in urls:
                server.holds, server.last = None, "did not prove its weights to the rank that pushed them"

    async def sample_each(self, calls: Sequence[Call]) -> dict[str, list[Output]]:
        """By address, the outputs of each server with the version, all calls at each. While none succeeds they are asked again,
        for `patience` seconds. Those that fail get no outputs until a push. Raises EngineError where all do."""
        await self.settle()
        end = time.monotonic() + self._patience
        for pause in pauses():
            servers = [server for server in self.servers if server.holds is not None]
            tried = await asyncio.gather(*(self._sample_all(server, calls) for server in servers))
            found = {server.url: outputs for server, outputs in zip(servers, tried, strict=True) if outputs is not None}
            if found or not servers or time.monotonic() + pause > end:
                break
            await asyncio.sleep(pause)
        for server in servers:
            server.holds = server.holds if server.url in found else None
        if not found:
            raise self.error("no server that took the weights samples from them")
        return found

    async def begin(self) -> None:
        """A generation starts: asks the servers for their version, before one samples thousands of tokens from another."""
        await self.settle()
        self._lost, self._alone_since = None, None
        self._admission = asyncio.create_task(self._admit([server for server in self.servers if server.usable]))

    async def settle(self) -> None:
        """Ends the fleet's own questions: an answer to one asked before a push would be about weights that are gone."""
        tasks = [task for task in (self._admission, self._rescue) if task is not None]
        self._admission = self._rescue = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def error(self, what: str) -> EngineError:
        """Names each server and what it did last."""
        each = "; ".join(f"{server.url}: {server.last}" for server in sorted(self.servers, key=lambda server: server.url))
        return EngineError(f"vllm-server: {what}: {each}")

    # outputs

    async def sample(self, call: Call, cost: int, count: Callable[[int], None]) -> Output:
        """One output, from whichever server finishes it. cost: of prompt and longest response, tokens. Raises EngineError where
        none is left."""
        if self._admission is not None:
            await asyncio.shield(self._admission)
        for pause in pauses():
            server = await self._acquire(cost)
            try:
                output = await server.client.sample(call, count)
            except ServerFault as fault:
                self._mark(server, fault)
            else:
                self._alone_since = None
                return output
            finally:
                self._release(server, cost)
            await asyncio.sleep(pause)
        raise AssertionError  # pauses() does not end

    async def _acquire(self, cost: int) -> Server:
        """The usable server with the fewest tokens outstanding, as soon as one may take more; who waits is served in order."""
        if self._lost is not None:
            raise self._lost
        waiting: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._waiting.append((waiting, cost))
        self._grant()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._release(waiting.result(), cost)
            raise

    def _grant(self) -> None:
        while self._waiting:
            free = [server for server in self.servers if server.usable and server.outputs < self._concurrency]
            if not free:
                return
            waiting, cost = self._waiting.popleft()
            if waiting.done():
                continue
            server = min(free, key=lambda each: each.outstanding)  # the first of equals: the rank's own first
            server.outstanding += cost
            server.outputs += 1
            waiting.set_result(server)

    def _release(self, server: Server, cost: int) -> None:
        server.outstanding -= cost
        server.outputs -= 1
        self._grant()

    # failures

    async def _asked(self, server: Server, seconds: float) -> ServerFault | None:
        try:
            reported = await server.client.weights(seconds)
        except ServerFault as fault:
            server.last = str(fault)
            return fault
        server.instance += reported != server.pushed
        return None

    async def _admit(self, servers: Sequence[Server]) -> None:
        await asyncio.gather(*(self._check(server) for server in servers))
        if not any(server.usable for server in self.servers):
            self._seek_rescue()

    async def _check(self, server: Server) -> None:
        """Marks a server that does not answer, or has other weights; unmarks one that has these."""
        held = server.holds
        try:
            weights = await server.client.weights(PROBE_SECONDS)
            if weights != held:
                raise ServerFault(f"holds weights {weights!r}, not {held!r}", stale=True)
        except ServerFault as fault:
            self._mark(server, fault)
        else:
            server.fault = None

    async def _sample_all(self, server: Server, calls: Sequence[Call]) -> list[Output] | None:
        """One after the other, so that the later ones meet what the first left in the prefix cache. None: it failed."""
        try:
            outputs = [await server.client.sample(call, lambda _: None) for call in calls]
        except ServerFault as fault:
            self._blame(server, fault)
            return None
        server.fault = None
        return outputs

    def _mark(self, server: Server, fault: ServerFault) -> None:
        self._blame(server, fault)
        if not any(each.usable for each in self.servers):
            self._seek_rescue()

    def _blame(self, server: Server, fault: ServerFault) -> None:
        server.last = str(fault)
        if server.usable:
            self._say(f"{server.url}: {fault}; its outputs go to others")
            server.fault = str(fault)
        server.final |= fault.final
        if fault.stale or fault.final:
            server.holds = None

    def _seek_rescue(self) -> None:
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        if self._lost is None and (self._rescue is None or self._rescue.done()):
            self._rescue = asyncio.create_task(self._seek(self._alone_since + self._patience))

    async def _seek(self, end: float) -> None:
        """Asks the marked servers whose weights are not in doubt, until one answers or the time is over."""
        for pause in pauses():
            hopeful = [server for server in self.servers if server.holds is not None]
            left = end - time.monotonic()
            if not hopeful or left <= 0:
                break
            await asyncio.sleep(min(pause, left))
            await asyncio.gather(*(self._check(server) for server in hopeful if server.holds is not None))
            back = [server.url for server in hopeful if server.usable]
            if back:
                self._say(f"{', '.join(back)}: answers again, with the same weights")
                self._grant()
                return
        self._lost = self.error("no server is left")
        while self._waiting:
            waiting, _ = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(self._lost)


def pauses() -> Iterator[float]:
    """Seconds, without end: exponential, with jitter."""
    for attempt in itertools.count():
        yield min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.5)
