"""What runs inside a rule worker: the scorers, and the clock over them. Only texts and plain dicts come in, so the process
imports neither torch nor NumPy of ours, and starts fast.

A scorer bounds no time of its own; it runs in a process that the worker forks and kills (`rollout.reward.checker`). reasoning-gym
executes some answers as Python: code is refused before (`rollout.reward.puzzle_answers`), and an answer that is more than plain
numbers is scored in a process of its own, so that nothing it does there could reach another's verdict.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import time
from typing import Any

from rollout.process import die_with
from rollout.reward.checker import Checker, DiedError, LateError
from rollout.reward.puzzle_answers import refusal

SCORERS = {"math-verify": "math_verify", "reasoning-gym": "reasoning_gym"}
"""Scorer's name → the package it needs, which is also the name of its distribution on PyPI (with - for _)."""

MEMORY_BYTES = 8 * 2**30
"""Most that a worker may allocate, and a quarter of the machine's memory where that is less. Without a limit one huge power can
end the trainer through the machine's OOM killer."""

_WARM_UP = (r"\frac{\sqrt{2}x_{1}+1}{2}", r"x^{2}-2x+1=0", r"(1,2)\cup[3,\infty)", r"\sin x+2\pi e^{-t}", "a<b")

_NUMBERS = re.compile(r"[\d\s.,/+-]*")
"""Answers that execute to nothing but numbers."""

Score = tuple[bool, str, str]
"""(right, reason, detail) of `rollout.types.Verdict`, as plain values that pickle small."""
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
    __import__(SCORERS[kind])
    if kind == "math-verify":
        # At first use modules are loaded and the LaTeX parser learns its tables: what is there before a fork, each fork has.
        for formula in _WARM_UP:
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
            alone = kind == "reasoning-gym" and not _NUMBERS.fullmatch(answer)
            scores.append(_checker.call(seconds, left, kind, gold, answer, entry, alone=alone))
        except LateError:
            scores.append(None)
        except DiedError as died:
            scores.append((False, "error", f"the checker died ({died})"))
    return scores


def score(kind: str, gold: str, answer: str, entry: dict[str, Any]) -> Score:
    """Is `answer` right? entry: the prompt as reasoning-gym's dict (math-verify does not look at it). An exception inside a
    scorer is an `error` score: the sample counts as not right and the metrics show it."""
    try:
        return _math_verify(gold, answer) if kind == "math-verify" else _reasoning_gym(gold, answer, entry)
    except BaseException as error:  # none may travel: some do not unpickle, and a SystemExit would end the checker
        # An `error` is not cached: what ran out of memory or of stack is tried anew in the next batch.
        return False, "error", f"{type(error).__name__}: {error}"[:300]


def _math_verify(gold: str, answer: str) -> Score:
    if gold.strip() == answer.strip():
        return True, "right", "the same text"
    from rollout.reward.answers.formulas import equal
    from rollout.reward.answers.match import match
    from rollout.reward.answers.prose import is_empty, same_prose

    same = match(gold, answer, equal)
    if same is None:
        same = same_prose(gold, answer, equal)
    if same:
        return True, "right", ""
    if is_empty(gold):
        return False, "error", f"nothing can be read in the ground truth {gold[:100]!r}"
    return False, "wrong", f"{answer[:100]!r} is not {gold[:100]!r}"


def _reasoning_gym(gold: str, answer: str, entry: dict[str, Any]) -> Score:
    from reasoning_gym import get_score_answer_fn

    puzzle = entry["metadata"]["source_dataset"]
    score_answer = get_score_answer_fn(puzzle)
    if why := refusal(puzzle, answer, gold):
        return False, "wrong", f"not scored: {why}"
    value = float(score_answer(answer=answer, entry=entry))
    right = value >= 1.0 - 1e-9
    return right, "right" if right else "wrong", f"score {value:g}"


def memory_of_machine() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit_memory(limit: int) -> None:
    import resource

    # RLIMIT_DATA rather than RLIMIT_AS: address space that libraries reserve and never touch does not count.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
