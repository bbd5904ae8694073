"""What runs inside a rule worker: the scorers. Only texts and plain dicts come in, so the process imports neither torch nor NumPy
of ours, and starts fast.

Nothing here bounds its own time. SymPy spends minutes inside one C call on an answer like 9^{9^{9^9}}, where no signal handler
and no other thread gets a turn; the pool (`rollout.reward.rule`) holds the clock and kills the process.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import Any

SCORERS = {"math-verify": "math_verify", "reasoning-gym": "reasoning_gym"}
"""Scorer's name → the package it needs, which is also the name of its distribution on PyPI (with - for _)."""

MEMORY_BYTES = 8 * 2**30
"""Most that a worker may allocate. Without a limit one huge power can end the trainer through the machine's OOM killer."""

_PR_SET_PDEATHSIG = 1

_DELIMITED = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed|\\fbox", re.DOTALL)
_NUMBER = re.compile(r"(?:\\?\$\s?)?[-+]?(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?|\d*[.,]?\d+\.?)\s*\\?%?")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)e\+?(\d+)", re.IGNORECASE)
"""Only upwards: the library compares decimals after rounding to 6 places, where 1e-8 and 2e-8 are equal."""
_COMMA_DECIMAL = re.compile(r"[-+]?\d+,\d+")
_FUNCTION = r"(?:sin|cos|tan|cot|sec|csc|arc\w{3}|log|exp|sqrt|abs|min|max|mod)[^\W\d_]?(?![^\W\d_])"
_UNIT = r"(?<=\d)\s*(?:mm|cm|km|mg|kg|ml|ft|in|mi|lb|oz|hr|am|pm)(?![^\W\d_])"
_WORD = re.compile(rf"(?<![^\W\d_])(?!{_FUNCTION})[^\W\d_]{{3,}}|{_UNIT}|[\u3400-\u9fff]", re.IGNORECASE)
_LATEX = re.compile(r"[\\^_{}]")
_THIN_SPACE = re.compile(r"(?<=\d)\\[,!;: ](?=\d{3})")

Score = tuple[bool, str, str]
"""(right, reason, detail) of `rollout.types.Verdict`, as plain values that pickle small."""


def start(kind: str, parent: int) -> None:
    """Initializer of a worker whose parent is process `parent`: die with it, ignore Ctrl-C, load the scorer off the clock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool's own SIGTERM handler is Python code, which a hang inside C never runs: the pool would wait seconds, then SIGKILL.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    _limit_memory(MEMORY_BYTES)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody holds the clock; the pool does
    __import__(SCORERS[kind])


def score(kind: str, gold: str, answer: str, entry: dict[str, Any]) -> Score:
    """Is `answer` right? entry: the prompt as reasoning-gym's dict (math-verify does not look at it). An exception inside a
    scorer is an `error` score: the sample counts as not right and the metrics show it."""
    try:
        return _math_verify(gold, answer) if kind == "math-verify" else _reasoning_gym(answer, entry)
    except BaseException as error:  # none may travel: some do not unpickle, and a SystemExit would end the trainer
        return False, "error", f"{type(error).__name__}: {error}"[:300]


def _math_verify(gold: str, answer: str) -> Score:
    if gold.strip() == answer.strip():
        return True, "right", "the same text"
    from math_verify import verify

    gold_parsed = [expression for form in math_forms(gold) for expression in _parse(form)]
    if not gold_parsed:
        return False, "error", f"math-verify finds nothing in the ground truth {gold[:100]!r}"
    answer_parsed = [expression for form in math_forms(answer) for expression in _parse(form)]
    # The library's own time limits are SIGALRM handlers; None switches them off.
    if verify(gold_parsed, answer_parsed, timeout_seconds=None):
        return True, "right", ""
    if not answer_parsed:
        return False, "wrong", f"math-verify finds nothing in {answer[:100]!r}"
    return False, "wrong", f"{answer[:100]!r} is not {gold[:100]!r}"


def _parse(form: str) -> list[Any]:
    from math_verify import parse
    from sympy import nan, zoo

    # "12:00" parses as 12/0; kept, it would equal every other x:00.
    return [part for part in parse(form, parsing_timeout=None) if isinstance(part, str) or (part is not zoo and part is not nan)]


def math_forms(text: str) -> list[str]:
    """The readings of a ground truth or answer that math-verify is given, any of which may match.

    The library reads LaTeX only between delimiters, and picks the last number out of anything else: it takes a bare `2\\sqrt{3}`
    for 2. So
    - text with delimiters ($…$, \\(…\\), \\[…\\], \\boxed) stays as it is,
    - a bare number too (1,000 and 72% and $18); 1,5 is read as a decimal and as two numbers, 3e6 as 3·10^6,
    - bare words without LaTeX ("72 apples", "5 cm") stay, the last number counts; without a number they are compared as
      \\text{…}, and if they are short (abc) as a product of variables too,
    - any other bare text is one formula: $…$.
    """
    text = _THIN_SPACE.sub("", text.strip())
    if _DELIMITED.search(text):
        return [text]
    formula = "$" + text.replace(r"\$", "").replace("$", "").strip() + "$"
    if _COMMA_DECIMAL.fullmatch(text) and not re.fullmatch(r"[-+]?\d{1,3},\d{3}", text):
        return [text, formula]
    if _NUMBER.fullmatch(text):
        return [text.replace(r"\$", "").replace("$", "")]
    if scientific := _SCIENTIFIC.fullmatch(text):
        return [rf"${scientific[1]}\cdot 10^{{{scientific[2]}}}$"]
    if _WORD.search(text) and not _LATEX.search(text):
        if re.search(r"\d", text):
            return [text]
        words = rf"$\text{{{text}}}$"
        return [words, formula] if len(text) <= 3 else [words]
    return [formula]


def _reasoning_gym(answer: str, entry: dict[str, Any]) -> Score:
    from reasoning_gym import get_score_answer_fn

    score_answer = get_score_answer_fn(entry["metadata"]["source_dataset"])
    value = float(score_answer(answer=answer, entry=entry))
    right = value >= 1.0 - 1e-9
    return right, "right" if right else "wrong", f"score {value:g}"


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends (`rollout.reward.rule` keeps it alive)."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def _limit_memory(limit: int) -> None:
    import resource

    # RLIMIT_DATA rather than RLIMIT_AS: address space that libraries reserve and never touch does not count.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
