"""What a check finds, and how checks are run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rollout.errors import InputError

Status = Literal["ok", "warn", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. mend: what to do; "" where all is well."""

    status: Status
    name: str
    found: str
    mend: str = ""

    def line(self) -> str:
        text = f"{self.status:4} {self.name:12} {self.found}" + (f"; {self.mend}" if self.mend else "")
        return " ".join(text.split("\n"))


@dataclass(frozen=True, slots=True)
class Check:
    """look: gives its findings; an InputError is a FAIL with its text. seconds: after which it is given up."""

    name: str
    look: Callable[[], list[Finding]]
    seconds: float = 20.0


def ok(name: str, found: str) -> list[Finding]:
    return [Finding("ok", name, found)]


def unchecked(name: str, why: str) -> list[Finding]:
    """Said where something cannot be looked at, so that nobody takes silence for health."""
    return [Finding("skip", name, f"not checked: {why}")]


def run_checks(checks: list[Check]) -> Iterator[list[Finding]]:
    """The findings of each, in order. One that hangs stays behind in its thread, which does not keep the process from its end."""
    for check in checks:
        outcome: list[list[Finding]] = []
        thread = threading.Thread(target=lambda check=check, out=outcome: out.append(_looked(check)), daemon=True)
        start = time.monotonic()
        thread.start()
        thread.join(check.seconds)
        if outcome:
            yield outcome[0]
        else:
            waited = time.monotonic() - start
            yield [
                Finding("FAIL", check.name, f"no answer within {waited:.0f} s", "look why it hangs: a dead network disk or host?")
            ]


def _looked(check: Check) -> list[Finding]:
    try:
        return check.look()
    except InputError as error:
        return [Finding("FAIL", check.name, " ".join(str(error).split()))]
    except BaseException as error:  # a check must never take the others with it
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding("FAIL", check.name, f"the check itself failed ({text})", "report this; the other lines stand")]


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.status == "FAIL" for finding in findings))


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
