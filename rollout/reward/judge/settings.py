"""What a judge is and may cost."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from rollout.errors import InputError

Process = Literal["thinking", "answer", "off"]
KEY_VARIABLE = "KEJU_JUDGE_API_KEY"


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """The paper names an LLM as judge, which also checks the solving process, and no more; all of this is ours."""

    base_url: str
    """As OpenAI clients take it: http://127.0.0.1:8000/v1."""
    model: str
    api_key_env: str = KEY_VARIABLE
    """Environment variable that holds the key. Without one none is sent, which is for endpoints on this host alone."""
    process: Process = "thinking"
    """Where the solving process is read: in the think block, in the answer block, or not at all."""
    process_counts: bool = True
    """Whether a right final answer that was reached by a wrong process is R = -1. False: it is shown in the detail alone."""
    concurrency: int = 16
    """Requests at once, on each rank."""
    tries: int = 4
    """Requests for one sample, the first included."""
    timeout_seconds: float = 60.0
    """For one request, to its last byte."""
    deadline_seconds: float = 300.0
    """For all that is judged at once; what has no verdict by then stays unjudged."""
    budget_requests: int | None = None
    """Requests in the whole run, failed ones included, over all ranks."""
    budget_tokens: int | None = None
    """Tokens in the whole run, prompts included, as the endpoint counts them; what is under way when it is spent goes beyond."""
    max_tokens: int | None = 1024
    """Of a verdict with its reason; None: the endpoint's own limit."""
    temperature: float | None = 0.0
    """None: the endpoint's own; some models take no other."""
    reason_chars: int | None = 600
    """Upper bound on the reason, part of the schema (maxLength); None for endpoints whose schemas know no such bound."""
    max_answer_chars: int = 8000
    """A longer answer is wrong without being asked about."""
    max_thinking_chars: int = 24000
    """Of a longer thinking the judge reads the first and the last half of so much, and how much is left out."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Added to each request, such as {"chat_template_kwargs": {"enable_thinking": false}}."""


def api_key(settings: JudgeSettings) -> str | None:
    """From the environment. Raises InputError, which never holds it, where it cannot be sent, or is missing and needed."""
    key = os.environ.get(settings.api_key_env, "")
    if not key:
        host = urlsplit(settings.base_url).hostname or ""
        if not is_loopback(host):
            raise InputError(
                f"reward.judge.api_key_env: {settings.api_key_env} is empty, and {host} is not this host; put the judge's key "
                "there (any word where it asks for none)"
            )
        return None
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"{settings.api_key_env}: holds characters other than printable ASCII, or a blank; set another key")
    return key


def address_fault(base_url: str) -> str | None:
    """What is wrong with it as the base address of an endpoint; None where nothing is."""
    if not re.fullmatch(r"https?://[^/\s?#]+(?:/[^\s?#]*)?", base_url):
        return f"{base_url!r} is not a base address such as http://127.0.0.1:8000/v1"
    if "@" in base_url:
        return f"it holds a name or password; put the key into the environment ({KEY_VARIABLE})"
    return None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
