"""Step 7: remove answers that the rule verifier cannot verify against themselves.

An answer that math-verify does not find equal to itself makes every sample wrong: the group is uniform, and its prompt is spent
for nothing. Each DISTINCT answer is asked once, in worker processes that are killed at a hard limit. A plain number is not
asked, for math-verify reads every one. A sentence is no answer for a rule, though the library would compare its letters; nor is
the answer of a question with several sub-questions.

The limit makes the result depend on the machine where an answer takes about as long as it; it is generous (10 s against some
ms), and an answer that runs into it is tried once more alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from curation import verify_worker
from curation.answers import is_plain_number
from curation.errors import InputError
from curation.options import Options
from curation.store import Outcome, Removed, Rows

GROUP = 32
"""Answers sent to a worker at once."""
START_SECONDS = 120.0
"""How long loading SymPy may take on a slow machine."""
LONGEST = 300
"""Characters; a longer answer is a text."""
_HAN_TEXT = re.compile(r"[\u3400-\u9fff]")
_SENTENCE = re.compile(r"(?:[A-Za-z]{2,}[ ,;.]+(?:[aI] )?){4,}[A-Za-z]{2,}")


def remove_unverifiable(rows: Rows, options: Options, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reasons: `text`, `subquestions`, `unreadable`, `unequal`, `error`, `timeout`. Exempt rows stay, for the judge."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("the step verifiable needs the package math-verify; pip install math-verify, or --skip verifiable")
    answers = _distinct(rows)
    asked = [answer for answer in answers if not is_plain_number(answer) and not is_text(answer)]
    verdicts = dict(zip(asked, verify(asked, options.verify_seconds, options.threads), strict=True))
    reasons, judged, position = np.full(len(rows), "", object), [], 0
    for frame in rows.batches("answer", "flags", "exempt"):
        for place, (answer, flags, exempt) in enumerate(frame.iter_rows(), start=position):
            stripped = (answer or "").strip()
            reason = (
                "subquestions"
                if "subquestions" in flags.split(",")
                else "text"
                if is_text(stripped)
                else verdicts.get(stripped, "")
            )
            if reason and exempt:
                judged.append(int(rows.numbers[place]))
            elif reason:
                reasons[place] = reason
        position += len(frame)
        progress(len(frame))
    gone = reasons != ""
    return Outcome.without(
        rows, Removed.of(rows.numbers[gone], reasons[gone]), {"distinct_answers": len(answers), "asked": len(asked)}, judged
    )


def _distinct(rows: Rows) -> list[str]:
    found: dict[str, None] = {}
    for frame in rows.batches("answer"):
        found.update(dict.fromkeys((answer or "").strip() for answer in frame["answer"].unique(maintain_order=True).to_list()))
    return list(found)


def is_text(answer: str) -> bool:
    """No expression but words: a Chinese answer without a digit or formula, a sentence, pages, nothing."""
    if not answer or len(answer) > LONGEST or _SENTENCE.search(answer):
        return True
    return bool(_HAN_TEXT.search(answer)) and (not re.search(r"[0-9]", answer) or len(_HAN_TEXT.findall(answer)) > 6)


def verify(answers: Sequence[str], seconds: float, workers: int) -> list[str]:
    """`verify_worker.verify_itself` of each answer, or "timeout", or "error" where it ended its worker; in order.

    Raises RuntimeError where a worker does not start: that is the environment's trouble, and no answer's."""
    verdicts = [""] * len(answers)
    places = [list(range(begin, min(begin + GROUP, len(answers)))) for begin in range(0, len(answers), GROUP)]
    # A group shares one clock; the answers of a group that ran into it, or ended its worker, are asked again one by one.
    for limit in (seconds, 2 * seconds):
        again = []
        for group, result in zip(
            places, _ask([[answers[place] for place in group] for group in places], limit, workers), strict=True
        ):
            if isinstance(result, str) and limit == seconds:
                again += [[place] for place in group]
            for place, verdict in zip(group, [result] * len(group) if isinstance(result, str) else result, strict=True):
                verdicts[place] = verdict
        places = again
    return verdicts


def _ask(groups: list[list[str]], seconds: float, workers: int) -> list[list[str] | str]:
    """Each group's verdicts, or "timeout" or "error" for it as a whole. One thread drives one worker."""
    waiting, results = deque(enumerate(groups)), [[]] * len(groups)

    def drive() -> None:
        worker = None
        try:
            while waiting:
                with contextlib.suppress(IndexError):  # another thread was faster
                    number, group = waiting.popleft()
                    worker = worker or _Worker()
                    results[number] = worker.ask(group, seconds)
                    if isinstance(results[number], str):
                        worker.kill()
                        worker = None
        finally:
            if worker is not None:
                worker.kill()

    with ThreadPoolExecutor(max(1, min(workers, len(groups)))) as pool:
        for driver in [pool.submit(drive) for _ in range(min(workers, len(groups)))]:
            driver.result()
    return results


class _Worker:
    """A worker process and the pipes to it. multiprocessing would import the program's main module again in each."""

    def __init__(self) -> None:
        command = [sys.executable, verify_worker.__file__, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._line(START_SECONDS) != b"ready":
            self.kill()
            raise RuntimeError(f"a verification worker did not start (exit code {self._process.returncode}): {' '.join(command)}")

    def ask(self, answers: list[str], seconds: float) -> list[str] | str:
        try:
            self._process.stdin.write(json.dumps(answers).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return "error"
        line = self._line(seconds)
        return "timeout" if line is None else json.loads(line) if line else "error"

    def _line(self, seconds: float) -> bytes | None:
        """Its next line; None where the time is over, b"" where it ended."""
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            line += piece
        return line.rstrip(b"\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
