"""A scripted judge that speaks as much of OpenAI's chat completions as `rollout.reward.judge` uses, on 127.0.0.1, in this
process.

What a request is answered follows from the script: a queue of acts, one a request, and `otherwise` when the queue is empty. It
judges by the material as it is asked: an answer that ends in "right" is right, in "process" has a wrong process.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.rollout.loop_server import LoopServer

Act = Any
"""An HTTP status; (status, headers); "silent"; "cut"; "drip" (a byte at a time); "garbage" and "html" (a 200 that is no JSON);
"judge"; bytes or a dict (the body of a 200); any other str (the message's content); or a callable of the request's body that
gives one of these."""


def block(body: dict[str, Any], name: str = "ANSWER") -> str:
    """The material of a block, as it was before it got its prefixes."""
    user = body["messages"][1]["content"]
    found = re.search(rf"^BEGIN {name} (\w+)\n(.*?)\nEND {name} \1$", user, re.DOTALL | re.MULTILINE)
    return "\n".join(line.removeprefix("| ") for line in found[2].split("\n"))


def judged(body: dict[str, Any], right: bool, process: bool = True, **changes: Any) -> str:
    """A well-formed reply to the request."""
    form = body["response_format"]["json_schema"]["schema"]["properties"]
    reply = {"reason": "scripted", "parts": dict.fromkeys(form["parts"]["properties"], right), "final": right}
    if "process" in form:
        reply["process"] = process
    return json.dumps(reply | changes)


def by_material(body: dict[str, Any]) -> str:
    answer = block(body)
    return judged(body, answer.endswith(("right", "process")), not answer.endswith("process"))


@dataclass
class ScriptedJudge(LoopServer):
    """key: demanded where set. Everything else may be changed while it runs. tokens: said of each completion."""

    key: str | None = None
    port: int = 0
    script: deque[Act] = field(default_factory=deque)
    otherwise: Act = "judge"
    delay: float = 0.0
    tokens: int = 100
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each request came, in the loop's time."""
    at_once: int = 0
    most_at_once: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_until(self, holds: Callable[[ScriptedJudge], bool], seconds: float = 20.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: holds(self), seconds), f"did not come within {seconds} s"

    async def _listen(self) -> None:
        self._transports: set[asyncio.Transport] = set()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        for transport in list(self._transports):
            transport.abort()
        await self._runner.cleanup()

    def connections(self) -> int:
        """Open ones."""
        return sum(not transport.is_closing() for transport in self._transports)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._transports.add(request.transport)
        body = await request.json()
        with self.changed:
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            self.times.append(self._loop.time())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.changed.notify_all()
        try:
            if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
                return web.json_response({"error": {"message": f"Incorrect API key provided: {self.key}"}}, status=401)
            if self.delay:
                await asyncio.sleep(self.delay)
            return await self._act(request, body, self.script.popleft() if self.script else self.otherwise)
        finally:
            with self.changed:
                self.at_once -= 1
                self.changed.notify_all()

    async def _act(self, request: web.Request, body: dict[str, Any], act: Act) -> web.StreamResponse:
        if callable(act):
            act = act(body)
        match act:
            case "judge":
                return self._completion(by_material(body))
            case "silent":
                await asyncio.sleep(3600)
            case "cut":
                request.transport.abort()
                return web.Response()
            case "drip":
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                await response.prepare(request)
                for byte in self._json(by_material(body)):
                    await response.write(bytes([byte]))
                    await asyncio.sleep(0.05)
                return response
            case "garbage":
                return web.Response(body=b'{"choices": [{"message"', content_type="application/json")
            case "html":
                return web.Response(text="<html>a proxy's page</html>", content_type="text/html")
            case int():
                return web.json_response({"error": {"message": "scripted failure"}}, status=act)
            case (int(), dict()):
                return web.json_response({"error": {"message": "scripted failure"}}, status=act[0], headers=act[1])
            case bytes():
                return web.Response(body=act, content_type="application/json")
            case dict():
                return web.json_response(act)
        return self._completion(act)

    def _completion(self, content: str) -> web.Response:
        return web.Response(body=self._json(content), content_type="application/json")

    def _json(self, content: str) -> bytes:
        return json.dumps(completion(content, self.tokens)).encode()


def completion(content: Any, tokens: int = 100, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens},
    }


@contextmanager
def scripted_judge(**fields: Any) -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge(**fields).start()
    try:
        yield judge
    finally:
        judge.stop()
