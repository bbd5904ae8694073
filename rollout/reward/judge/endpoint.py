"""One judge's endpoint: a case in, a decision out, or why there is none. Coroutines, all of one event loop.

A request is tried again after a time-out, a broken connection, HTTP 408, 409, 425, 429 or 5xx, and after a reply that is no
verdict; the pause doubles from one try to the next, and where the endpoint names one (Retry-After) all its requests keep it. What
it refuses for good (any other 4xx, a redirect) is not tried again, and a refusal that means every case (the key, the model) ends
the batch.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rollout.reward.judge.decision import Decision, Malformed, read_decision, schema
from rollout.reward.judge.request import Case, messages
from rollout.reward.judge.settings import JudgeSettings, is_loopback

if TYPE_CHECKING:
    import openai

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.5
MOST_PAUSE_SECONDS = 30.0
AGAIN = (408, 409, 425, 429)
"""HTTP statuses below 500 after which it is worth to ask again."""
MEANS_ALL = (401, 403, 404)
QUOTED = 300
"""Characters of an endpoint's error that are passed on."""


class Unanswered(Exception):
    """No decision on a case; the text, one line, says why."""

    def __init__(self, why: str) -> None:
        super().__init__(" ".join(why.split()))


@dataclass(slots=True)
class Batch:
    """What is judged at once. deadline: in the loop's time; ended: why nothing more is asked, once that is known; heard: whether
    the endpoint has answered as an endpoint does, be it that it refuses a case or that the judge's words are no verdict."""

    tries: int
    deadline: float
    ended: str = ""
    heard: bool = False


@dataclass(slots=True)
class Spent:
    """Over the whole run, on this rank."""

    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Fault(Exception):
    """One try's. pause: seconds that the endpoint asks for; final: it will be the same for every other case; heard: it is about
    this case, and the endpoint is well."""

    why: str
    again: bool
    pause: float | None = None
    final: bool = False
    heard: bool = False


class Endpoint:
    """budget_requests, budget_tokens: this rank's share; None: no bound. spent: counted up in place."""

    def __init__(
        self, settings: JudgeSettings, key: str | None, spent: Spent, budget_requests: int | None, budget_tokens: int | None
    ) -> None:
        self._settings, self._key, self._spent = settings, key, spent
        self._budget_requests, self._budget_tokens = budget_requests, budget_tokens
        self._client = _client(settings, key)
        self._free = asyncio.Semaphore(settings.concurrency)
        self._resume = 0.0
        """Until then, in the loop's time, the endpoint wants to be left alone."""
        self.retries = 0

    async def decide(self, case: Case, batch: Batch) -> Decision:
        """A pause that would pass the batch's deadline is not waited for. Raises Unanswered."""
        fault: _Fault | None = None
        for number in range(batch.tries):
            if fault is not None:
                await self._pause(number, fault, batch.deadline)
                self.retries += 1
            try:
                decision = await self._ask(case, batch)
                batch.heard = True
                return decision
            except _Fault as caught:
                fault = caught
                batch.heard |= fault.heard
                if fault.final:
                    batch.ended = batch.ended or fault.why
                if not fault.again:
                    raise Unanswered(fault.why) from None
        assert fault is not None
        raise Unanswered(fault.why + (f", after {batch.tries} tries" if batch.tries > 1 else ""))

    async def close(self) -> None:
        await self._client.close()

    def exhausted(self) -> str | None:
        """Which budget is spent."""
        if self._budget_requests is not None and self._spent.requests >= self._budget_requests:
            return f"the budget of {self._budget_requests} requests is spent"
        if self._budget_tokens is not None and self._spent.tokens >= self._budget_tokens:
            return f"the budget of {self._budget_tokens} tokens is spent"
        return None

    async def _pause(self, number: int, fault: _Fault, deadline: float) -> None:
        now = asyncio.get_running_loop().time()
        if fault.pause is not None:
            self._resume = max(self._resume, now + fault.pause)
        # Half of it is chance: what failed together must not come again together.
        backoff = min(MOST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
        until = max(now + backoff, self._resume)
        if until >= deadline:
            raise Unanswered(f"{fault.why}; the next try, in {until - now:.0f} s, would come after the deadline")
        await asyncio.sleep(until - now)

    async def _ask(self, case: Case, batch: Batch) -> Decision:
        """One request. Raises _Fault."""
        loop = asyncio.get_running_loop()
        async with self._free:
            while (wait := self._resume - loop.time()) > 0 and not batch.ended:
                if self._resume >= batch.deadline:
                    raise _Fault(f"the endpoint wants to be left alone for {wait:.0f} s, beyond the deadline", again=False)
                await asyncio.sleep(wait)
            if batch.ended:
                raise _Fault(batch.ended, again=False)
            if (why := self.exhausted()) is not None:
                raise _Fault(why, again=False, final=True)
            self._spent.requests += 1
            reply = await self._send(case)
        text = self._text(reply)
        process = self._settings.process != "off"
        try:
            return read_decision(text, case.parts, process=process)
        except Malformed as error:
            raise _Fault(f"the judge's reply is {error}", again=True, heard=True) from None

    async def _send(self, case: Case) -> Any:
        import openai

        try:
            # The client's own limit is for each wait of a read: a reply that trickles would never reach it.
            async with asyncio.timeout(self._settings.timeout_seconds):
                return await self._client.chat.completions.create(**self._body(case))
        except (TimeoutError, openai.APITimeoutError):
            raise _Fault(f"no reply within {self._settings.timeout_seconds:g} s", again=True) from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            raise _Fault(self._described(error.__cause__ or error), again=True) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            # A 200 whose body is no completion: what the client raises over it depends on where it stumbles.
            raise _Fault(f"an unreadable reply ({self._described(error)})", again=True) from None

    def _body(self, case: Case) -> dict[str, Any]:
        settings = self._settings
        form = schema(case.parts, process=settings.process != "off", reason_chars=settings.reason_chars)
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": messages(case, settings),
            "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": form}},
            "extra_body": dict(settings.extra_body),
        }
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        return body

    def _text(self, reply: Any) -> str:
        """The message of a completion. Counts its tokens. Raises _Fault: the client hands on what the endpoint sent unchecked."""
        usage = getattr(reply, "usage", None)
        tokens = getattr(usage, "total_tokens", None)
        self._spent.tokens += tokens if isinstance(tokens, int) and tokens > 0 else 0
        choices = getattr(reply, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        if getattr(choice, "finish_reason", None) == "length":
            raise _Fault(f"the judge's reply was cut at {self._settings.max_tokens} tokens (max_tokens)", again=True, heard=True)
        text = getattr(message, "content", None)
        if not isinstance(text, str):
            refusal = getattr(message, "refusal", None)
            why = f"the judge refused: {str(refusal)[:QUOTED]}" if refusal else "a reply without a message"
            raise _Fault(why, again=True, heard=bool(refusal))
        return text

    def _refused(self, error: openai.APIStatusError) -> _Fault:
        status = error.status_code
        why = f"HTTP {status}: {self._described(error)}"
        if status >= 500 or status in AGAIN:
            return _Fault(why, again=True, pause=retry_after(error.response.headers.get("retry-after")))
        final = status in MEANS_ALL or 300 <= status < 400
        return _Fault(why, again=False, final=final, heard=not final)

    def _described(self, error: BaseException) -> str:
        """One line without the key, which some endpoints echo."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self._key is not None:
            text = text.replace(self._key, "…")
        return text[:QUOTED]


def retry_after(header: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where it is neither, or not in the future."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _client(settings: JudgeSettings, key: str | None) -> openai.AsyncOpenAI:
    """Sends the key that the configuration names to the address that it names, and nothing of another account: the client would
    take OPENAI_API_KEY, organisation and project from the environment by itself."""
    import openai

    http = openai.DefaultAsyncHttpxClient(
        follow_redirects=False,
        trust_env=not is_loopback(urlsplit(settings.base_url).hostname or ""),  # a proxy does not lead to this host
    )
    return openai.AsyncOpenAI(
        api_key=key or "none",  # it insists on one
        default_headers={"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit},
        base_url=settings.base_url,
        timeout=openai.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds)),
        max_retries=0,  # it would not know of our deadline, budget and other requests
        http_client=http,
    )
