"""Calls to one vLLM server over HTTP, and what is believed of its answers. Coroutines, all of one event loop.

An output comes as server-sent events, so that a server at work is heard, and an abort is a closed connection. Its last event says
which weights sampled which of its tokens (vLLM's own `weight_versions`); an output not wholly of the expected ones is refused.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from rollout.engine import Decoding, Request
from rollout.types import FinishReason

CONNECT_SECONDS = 10.0
STREAM_INTERVAL = 32
"""Tokens an event brings: often enough to be a sign of life."""
NO_LOGPROB = -9999.0
"""What vLLM writes for NaN, minus infinity, or none."""
PASSING = (401, 403, 404, 429)
"""What a server refuses while its key, its routes or its load are not what they will be; other 4xx are about the request."""
QUOTED = 300
"""Characters of a server's error that are passed on."""

Event = dict[str, Any]


class ServerFault(Exception):
    """A server did not do what was asked; the text, one line, says why. stale: it answered, and its weights are not the ones
    expected. refused: it answered that it will not (4xx), and asking again will not help. final: it can do this, and would do the
    same to the same request again. answered: with an error, 4xx or 5xx."""

    def __init__(
        self, why: str, *, stale: bool = False, refused: bool = False, final: bool = False, answered: bool = False
    ) -> None:
        super().__init__(" ".join(why.split()))
        self.stale, self.refused, self.final, self.answered = stale, refused, final, answered


@dataclass(frozen=True, slots=True)
class Call:
    """One output to sample, as a server is asked. weights: the version string that must have sampled it."""

    body: bytes
    max_new_tokens: int
    weights: str

    @classmethod
    def of(cls, request: Request, decoding: Decoding, end_token_ids: Sequence[int], weights: str) -> Call:
        parameters = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": 0.0 if decoding.greedy else decoding.temperature,
            "top_p": 1.0 if decoding.greedy else decoding.top_p,
            "seed": None if decoding.greedy else request.seed,
            "stop_token_ids": list(end_token_ids),
            "ignore_eos": True,  # of the server's tokenizer; the trainer's end tokens alone end an output
            "logprobs": 0,
            "detokenize": False,
            "stream_interval": STREAM_INTERVAL,
        }
        body = {"token_ids": request.prompt_token_ids.tolist(), "stream": True, "sampling_params": parameters}
        return cls(json.dumps(body).encode(), decoding.max_new_tokens, weights)


@dataclass(slots=True)
class Output:
    """One output, event by event."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    spans: list[dict[str, Any]] | None = None
    """{"version", "start", "end"}: which weights sampled which tokens."""

    def take(self, event: Event) -> int:
        """Returns how many tokens came. Raises ServerFault, and KeyError, TypeError or IndexError where it is malformed."""
        if "error" in event:
            raise ServerFault(f"failed: {_message(event)}")
        choice = event["choices"][0]
        tokens = choice["token_ids"] or []
        entries = choice["logprobs"]["content"] or [] if tokens else []
        if [entry["token_id"] for entry in entries] != tokens:
            raise ServerFault("sent tokens and log-probabilities that do not belong together")
        self.token_ids += tokens
        self.logprobs += [entry["logprob"] for entry in entries]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.spans = choice.get("weight_versions") or self.spans
        return len(tokens)

    def check(self, call: Call) -> None:
        """Whole, sampled from the expected weights to its last token, and as long as asked. Raises ServerFault."""
        count = len(self.token_ids)
        if self.finish_reason not in ("stop", "length"):
            raise ServerFault(f"ended an output with {self.finish_reason!r}")
        _check_spans(self.spans, count, call.weights)
        if not 1 <= count <= call.max_new_tokens:
            raise ServerFault(f"sent {count} tokens where 1 to {call.max_new_tokens} were asked for")
        if self.finish_reason == "length" and count < call.max_new_tokens:
            why = f"cut an output at {count} of {call.max_new_tokens} tokens; raise its --max-model-len"
            raise ServerFault(why, final=True)
        if not all(math.isfinite(logprob) and logprob > NO_LOGPROB for logprob in self.logprobs):
            raise ServerFault("sampled tokens that have no log-probability (NaN): its weights are broken")

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """token_ids int32 [n], logprobs float32 [n]."""
        return np.asarray(self.token_ids, dtype=np.int32), np.asarray(self.logprobs, dtype=np.float32)


def _check_spans(spans: list[dict[str, Any]] | None, count: int, expected: str) -> None:
    if not spans:
        raise ServerFault("does not say which weights sampled its output", stale=True)
    others = sorted({str(span["version"]) for span in spans} - {expected})
    if others:
        raise ServerFault(f"sampled from weights {', '.join(others)!r}, not from {expected!r}", stale=True)
    if spans[0]["start"] != 0 or spans[-1]["end"] != count:
        raise ServerFault(f"says which weights sampled tokens {spans[0]['start']} to {spans[-1]['end']}, of {count}", stale=True)


class ServerClient:
    """url: base address. silence: seconds without a byte of any output, while outputs are awaited, after which it is lost."""

    def __init__(self, url: str, session: aiohttp.ClientSession, silence: float) -> None:
        self.url, self._session, self._silence = url, session, silence
        self._awaited = 0
        self._heard = 0.0

    async def call(self, method: str, path: str, seconds: float, body: Event | None = None) -> Event:
        """The answer, an object. Raises ServerFault where it refuses, fails, or takes longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                async with self._session.request(method, self.url + path, json=body, allow_redirects=False) as response:
                    return await _answered(response, path)
        except aiohttp.ClientError as error:
            raise ServerFault(f"{path}: {_described(error)}") from None
        except TimeoutError:
            raise ServerFault(f"no answer to {path} within {seconds:g} s") from None
        except OSError as error:
            raise ServerFault(f"{path}: {_described(error)}") from None

    async def weights(self, seconds: float) -> str:
        """The version of its weights, as whoever pushed them called it. Raises ServerFault."""
        answer = await self.call("GET", "/weight_info", seconds)
        if not isinstance(version := answer.get("weight_version"), str):
            raise ServerFault("/weight_info: names no version", stale=True)
        return version

    async def max_model_len(self, seconds: float) -> int | None:
        """Tokens of prompt and response together at which it ends an output; None where it does not say. Raises ServerFault."""
        answer = await self.call("GET", "/v1/models", seconds)
        try:
            return int(answer["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    async def sample(self, call: Call, count: Callable[[int], None]) -> Output:
        """count: told how many tokens have come, each time some have. Cancelled, it closes the connection, and the server stops.
        Raises ServerFault."""
        if not self._awaited:
            self._heard = time.monotonic()
        self._awaited += 1
        try:
            return await self._sample(call, count)
        except aiohttp.ClientError as error:
            raise ServerFault(_described(error)) from None
        except TimeoutError:  # before OSError, of which it is one
            raise ServerFault(f"silent for {self._silence:g} s while {self._awaited} outputs were awaited") from None
        except OSError as error:
            raise ServerFault(_described(error)) from None
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ServerFault(f"sent an output that cannot be read ({_described(error)})") from None
        finally:
            self._awaited -= 1

    async def _sample(self, call: Call, count: Callable[[int], None]) -> Output:
        address, headers = self.url + "/inference/v1/generate", {"Content-Type": "application/json"}
        async with asyncio.timeout(self._silence):
            response = await self._session.post(address, data=call.body, headers=headers, allow_redirects=False)
        output = Output()
        # Not `async with`: leaving that in the middle of an output would wait for its rest; close() ends the connection.
        try:
            if response.status != 200:
                async with asyncio.timeout(self._silence):
                    await _answered(response, "generate")
            async for event in self._events(response):
                count(output.take(event))
        finally:
            response.close()
        output.check(call)
        return output

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
        """Each "data:" of the stream, up to its [DONE]. Raises ServerFault where it ends before, TimeoutError for silence."""
        buffer = bytearray()
        while True:
            buffer += await self._next_bytes(response)
            *events, rest = bytes(buffer).split(b"\n\n")
            buffer[:] = rest
            for event in events:
                data = event.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if data and not event.startswith(b":"):
                    yield json.loads(data)

    async def _next_bytes(self, response: aiohttp.ClientResponse) -> bytes:
        while True:
            try:
                async with asyncio.timeout_at(self._deadline()):
                    data = await response.content.readany()
            except TimeoutError:
                # It may have been this process that slept: then the bytes are there.
                data = response.content.read_nowait()
                if not data:
                    # Another output of this server may have been heard: then it is at work, and this one waits its turn.
                    if time.monotonic() - self._heard >= self._silence:
                        raise
                    continue
            if not data:
                raise ServerFault("ended the connection in the middle of an output")
            self._heard = time.monotonic()
            return data

    def _deadline(self) -> float:
        """In the loop's time."""
        return asyncio.get_running_loop().time() + self._heard + self._silence - time.monotonic()


async def _answered(response: aiohttp.ClientResponse, path: str) -> Event:
    text = await response.text("utf-8", errors="replace")  # a proxy's error page may be anything
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    if response.status != 200:
        why = f"{path}: HTTP {response.status} {_message(answer)}"
        refused = 400 <= response.status < 500
        raise ServerFault(why, refused=refused, final=refused and response.status not in PASSING, answered=True)
    return answer if isinstance(answer, dict) else {}


def _message(answer: Any) -> str:
    """Of vLLM's error objects, {"error": {"message": …}} or {"error": …}, else the text itself."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:QUOTED]


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def open_session(key: str | None) -> aiohttp.ClientSession:
    """For all servers of one loop. key: sent as bearer, to no one else: redirects are not followed, proxies not used."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    # A connection a call: a kept one may be closed by the server in the moment it is used again, which would look like its death.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout, trust_env=False)
