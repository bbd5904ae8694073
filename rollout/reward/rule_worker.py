"""What runs inside a rule worker: the clock over the scorers (`rollout.reward.rules`). Only texts and plain dicts come in, so the
process imports neither torch nor NumPy of ours, and starts fast.

A scorer runs in a process that the worker forks and kills (`rollout.reward.checker`).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from typing import Any

from rollout.process import die_with
from rollout.reward.checker import Checker, DiedError, LateError
from rollout.reward.rules import RULES, Score

MEMORY_BYTES = 8 * 2**30
"""Most that a worker may allocate, and a quarter of the machine's memory where that is less. Without a limit one huge power can
end the trainer through the machine's OOM killer."""

Job = tuple[str, str, dict[str, Any]]
"""(ground truth, answer, reasoning-gym's entry or {})."""


def start(kind: str, parent: int) -> None:
    """Initializer of a worker whose parent is process `parent`: die with it, ignore Ctrl-C, load the scorer off the clock."""
    global _checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool's own SIGTERM handler is Python code, which waits for its turn; the pool would wait seconds, then SIGKILL.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    _limit_memory(min(MEMORY_BYTES, memory_of_machine() // 4))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody holds the clock; the worker does
    if RULES[kind].package is not None:
        __import__(RULES[kind].package)
    for formula in RULES[kind].warm_up:
        score(kind, formula, formula + "+1", {})
    gc.freeze()  # a fork's first collection would else copy every page that it shares with this process
    _checker = Checker(score)


_checker: Checker


def ready() -> bool:
    """Runs once a worker has started."""
    return True


def check(kind: str, jobs: list[Job], seconds: float, at_most: float, end: float) -> list[Score | None]:
    """A score for each job, or None where it takes more than `seconds` of processor time or `at_most` by the clock.

    At `end`, on the clock of time.monotonic() that all processes of a machine share, it stops: jobs whose turn has not come are
    missing from the list.
    """
    scores: list[Score | None] = []
    for gold, answer, entry in jobs:
        left = min(at_most, end - time.monotonic())
        if left <= 0:
            break
        try:
            alone = not RULES[kind].shares(answer)
            scores.append(_checker.call(seconds, left, kind, gold, answer, entry, alone=alone))
        except LateError:
            scores.append(None)
        except DiedError as died:
            scores.append((False, "error", f"the checker died ({died})"))
    return scores


def score(kind: str, gold: str, answer: str, entry: dict[str, Any]) -> Score:
    """Is `answer` right? An exception inside a scorer is an `error` score: the sample counts as not right and the metrics show
    it."""
    try:
        return RULES[kind].score(gold, answer, entry)
    except BaseException as error:  # none may travel: some do not unpickle, and a SystemExit would end the checker
        # An `error` is not cached: what ran out of memory or of stack is tried anew in the next batch.
        return False, "error", f"{type(error).__name__}: {error}"[:300]


def memory_of_machine() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit_memory(limit: int) -> None:
    import resource

    # RLIMIT_DATA rather than RLIMIT_AS: address space that libraries reserve and never touch does not count.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
