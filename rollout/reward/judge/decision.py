"""What a judge answers: a schema that leaves it nothing to say but a verdict, and a reading that believes nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rollout.types import Verdict

SHOWN = 300
"""Characters of a reason or a reply that a verdict's detail shows."""


class Malformed(ValueError):
    """A reply that is no verdict, or one that contradicts itself; one line, why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """parts: is each part of the final answer right; process: is the way to it, None where that was not asked."""

    parts: tuple[bool, ...]
    process: bool | None
    reason: str

    @property
    def final(self) -> bool:
        return all(self.parts)

    def verdict(self, *, process_counts: bool) -> Verdict:
        """The sample's."""
        detail = f"judge: {' '.join(self.reason.split())[:SHOWN]}"
        if not self.final:
            wrong = [str(number) for number, right in enumerate(self.parts, start=1) if not right]
            return Verdict(False, "wrong", detail if len(self.parts) == 1 else f"part {', '.join(wrong)} wrong; {detail}")
        if self.process is False:
            return Verdict(not process_counts, "process" if process_counts else "right", f"process wrong; {detail}")
        return Verdict(True, "right", detail)


def schema(parts: int, *, process: bool, reason_chars: int | None) -> dict[str, Any]:
    """JSON schema in the subset that every endpoint takes: all keys required, no others, one boolean a part. The reason comes
    first: what is written before a verdict can move it, what comes after cannot."""
    reason = {"type": "string"} | ({"maxLength": reason_chars} if reason_chars is not None else {})
    numbered = {str(number): {"type": "boolean"} for number in range(1, parts + 1)}
    properties = {"reason": reason, "parts": _object(numbered), "final": {"type": "boolean"}}
    if process:
        properties["process"] = {"type": "boolean"}
    return _object(properties)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def read_decision(text: str, parts: int, *, process: bool) -> Decision:
    """The reply as a decision. Raises Malformed for anything but one JSON object of exactly the schema's keys and types, once
    each, whose `final` says what its parts say."""
    try:
        reply = json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, Malformed) else Malformed(f"not JSON: {_shown(text)}") from None
    expected = {"reason", "parts", "final"} | ({"process"} if process else set())
    if not isinstance(reply, dict) or set(reply) != expected:
        raise Malformed(f"not the keys {', '.join(sorted(expected))}: {_shown(text)}")
    numbers = [str(number) for number in range(1, parts + 1)]
    verdicts = reply["parts"]
    if not isinstance(verdicts, dict) or set(verdicts) != set(numbers):
        raise Malformed(f"not a verdict on each of {parts} parts: {_shown(text)}")
    flags = [*verdicts.values(), reply["final"], *([reply["process"]] if process else [])]
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(reply["reason"], str):
        raise Malformed(f"a verdict that is not true or false: {_shown(text)}")
    decision = Decision(tuple(verdicts[number] for number in numbers), reply["process"] if process else None, reply["reason"])
    if decision.final != reply["final"]:
        raise Malformed(f"contradicts itself: {_shown(text)}")
    return decision


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads keeps the last of two equal keys; a reply with two verdicts is none."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise Malformed("the same key twice")
    return dict(pairs)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
