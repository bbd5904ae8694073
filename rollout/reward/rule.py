"""Correctness by rule, behind HARD time limits: for each answer, and for the batch.

A thread cannot be killed, and a signal handler waits for the C call that hangs; so a process it is.

The workers
- are spawned, not forked: a fork of a process with CUDA and threads inherits locks that nobody will open;
- do not import the program's `__main__` again, as spawned processes otherwise do: a trainer's main module would load torch into
  each worker. So the program needs no `if __name__ == "__main__"` for their sake, and nothing defined in `__main__` reaches them;
- ignore Ctrl-C and die with the process that made them, however that one ends;
- calculate in a process that each forks, and kills where it is late (`rollout.reward.checker`).

How a batch's time is shared. No answer may go without a turn because others hang, so the batch goes in rounds. In each, every
answer that is left gets the same time: what the batch has left, times the workers, over the answers; at most timeout_seconds.
In the first round, where some wait for others' turns to end, it is half of that, and at least half a second. What does not end in
its turn is put off to the next round, where fewer are left, and each gets more. Thus in 70 s on 2 workers each of 256 answers
gets half a second, whatever the others do, and the few that hang get more, as long as there is time. Turns are measured in
processor time, but take at most double by the clock; timeout_seconds and batch_seconds are by the clock. The answers that look
quick come first.

multiprocessing's own resource tracker, one small process for the whole program, lives until the program's end.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

from rollout.errors import InputError
from rollout.reward import rule_worker
from rollout.reward.puzzle_answers import UNSCORABLE
from rollout.reward.rules import RULES
from rollout.reward.spawn import MainlessSpawn
from rollout.types import Prompt, Verdict

START_SECONDS = 120.0
"""How long starting or replacing the workers may take on a slow machine (SymPy alone is a second of import on a fast one)."""

STALL_SECONDS = 0.7
"""How long after the batch's end a worker may take to say so, before the pool counts as stalled and is killed."""

ANSWER_SECONDS = 0.5
"""What the batch's time grows by with each answer, where no time is set: 50 times what one takes."""

FIRST_SECONDS = 0.5
"""The least that an answer is given in its first turn, even if then not every one can have a turn should all hang."""

MOST_IN_A_CHUNK = 8
"""Answers that a worker takes at once in the first round, for fewer messages; one at a time towards the end, which is where the
slow ones are and all workers shall be busy."""


class RuleVerifier:
    """Judges answers by rule in worker processes. A context manager; `close` ends the workers.

    Verdict reasons: right, wrong, timeout (its process was killed), error (the scorer raised, the worker died, the ground truth
    is unreadable), unjudged (the batch's time was over before its first turn). Verdicts right and wrong are cached, the least
    recently used forgotten first; any other is tried anew in the next batch, since a busy machine may have caused it.
    """

    def __init__(
        self, kind: str, workers: int, timeout_seconds: float, *, batch_seconds: float | None = None, cache_size: int = 65536
    ) -> None:
        """kind: of `rollout.reward.rules.RULES` (for "reasoning-gym" the prompt's metadata is its entry, or its metadata with
        source_dataset). timeout_seconds: for one answer, from its start in a worker. batch_seconds: for one `verify`, once a
        worker has started; None: timeout_seconds, and ANSWER_SECONDS for each answer on one worker.
        The workers start at once, and load their scorer beside whatever the caller does next.

        Raises InputError for an unknown kind, a missing package, no workers, no time.
        """
        if kind not in RULES:
            close = difflib.get_close_matches(kind, RULES, n=1, cutoff=0.0)
            raise InputError(f"reward.rule: {kind!r} is no rule; the nearest is {close[0]!r}")
        package = RULES[kind].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(f"reward.rule: {kind!r} needs the package {package}; pip install {package.replace('_', '-')}")
        if workers < 1:
            raise InputError(f"reward.workers: {workers} is too few; give it 1 or more")
        if not timeout_seconds > 0:
            raise InputError(f"reward.timeout_seconds: {timeout_seconds} is no time; give it more than 0")
        if batch_seconds is not None and not batch_seconds > 0:
            raise InputError(f"reward.batch_seconds: {batch_seconds} is no time; give it more than 0")
        self._kind, self._workers, self._timeout, self._batch = kind, workers, timeout_seconds, batch_seconds
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._cache_size = cache_size
        self._pool: _Pool | None = _Pool(kind, workers)

    def verify(self, pairs: list[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, answer), in order. One caller at a time.

        Equal pairs are checked once. It ends within the batch's time + 1 s of the moment at which a worker is ready, whatever the
        answers do. Raises RuntimeError where workers keep dying before they take any work.
        """
        keys = [_key(self._kind, prompt, answer) for prompt, answer in pairs]
        verdicts = {key: self._cache[key] for key in keys if key in self._cache}
        jobs = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in verdicts}
        verdicts |= self._run(jobs)
        for key in keys:
            self._remember(key, verdicts[key])
        return [verdicts[key] for key in keys]

    def close(self) -> None:
        """End the workers and wait for their end. May be called again; a later `verify` starts new workers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def __enter__(self) -> RuleVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        if verdict.reason in ("right", "wrong"):
            self._cache[key] = verdict
            self._cache.move_to_end(key)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _run(self, jobs: dict[bytes, tuple[Prompt, str]]) -> dict[bytes, Verdict]:
        """A verdict for each job, in rounds (see above)."""
        if not jobs:
            return {}
        self._await_worker()
        batch = self._batch or batch_time(len(jobs), self._workers, self._timeout)
        end = time.monotonic() + batch
        verdicts: dict[bytes, Verdict] = {}
        tried: dict[bytes, float] = {}
        died: dict[bytes, int] = {}
        seconds = 0.0
        while left := {key: job for key, job in jobs.items() if key not in verdicts}:
            share = (end - time.monotonic()) * self._workers / len(left)
            if not seconds and len(left) > self._workers:
                share = max(share / 2, FIRST_SECONDS)
            seconds, last = min(self._timeout, share), seconds
            if seconds <= last and not died:
                break  # another turn, no longer than the last, would end as that did
            for key, outcome in self._round(left, seconds, end, in_turn=last > 0).items():
                if isinstance(outcome, Verdict):
                    verdicts[key] = outcome
                elif outcome == "died":
                    died[key] = died.get(key, 0) + 1
                    if died[key] == 2:
                        verdicts[key] = Verdict(False, "error", "its worker died twice")
                elif outcome == "late":
                    tried[key] = seconds
                    if seconds >= self._timeout:
                        verdicts[key] = Verdict(False, "timeout", f"no verdict within {self._timeout:g} s")
            if time.monotonic() >= end:
                break
        for key in jobs.keys() - verdicts.keys():
            if key in tried:
                why = f"no verdict within {tried[key]:.2g} s, its share of the batch's {batch:g} s"
                verdicts[key] = Verdict(False, "timeout", why)
            else:
                verdicts[key] = Verdict.unjudged(f"the batch's {batch:g} s were over before its turn")
        return verdicts

    def _await_worker(self) -> None:
        """Until a worker has started, so that no answer pays for its imports. Replaces a pool that broke (an idle worker killed
        from outside breaks it)."""
        for _ in range(3):
            if self._pool is None or not self._pool.active:
                self.close()
                self._pool = _Pool(self._kind, self._workers)
            try:
                self._pool.submit(rule_worker.ready, START_SECONDS).result()
                return
            except (
                ProcessExpired,
                BrokenProcessPool,
                CancelledError,
                RuntimeError,
                TimeoutError,
            ):  # RuntimeError: pebble's pool broke in between
                self.close()
        raise RuntimeError(f"the {self._kind} workers died three times before they took any work; their errors are on stderr")

    def _round(
        self, jobs: dict[bytes, tuple[Prompt, str]], seconds: float, end: float, *, in_turn: bool
    ) -> dict[bytes, Verdict | Literal["late", "died"]]:
        """Each job once, for at most `seconds`, until `end`. A job whose turn did not come is missing. in_turn: one at a time."""
        if self._pool is None or not self._pool.active:
            self._await_worker()
        futures: list[tuple[list[bytes], Future]] = []
        try:
            at_most = min(self._timeout, 2 * seconds)
            order = sorted(jobs, key=lambda key: _suspicion(jobs[key][1]))
            while order:
                size = 1 if in_turn else max(1, min(MOST_IN_A_CHUNK, len(order) // (8 * self._workers)))
                keys, order = order[:size], order[size:]
                work = [self._job(*jobs[key]) for key in keys]
                limit = (
                    START_SECONDS + end - time.monotonic()
                )  # of a worker that stalls itself; the clock over each job is the worker's
                futures.append((keys, self._pool.submit(rule_worker.check, limit, self._kind, work, seconds, at_most, end)))
        except RuntimeError:
            self.close()
        pending = wait([future for _, future in futures], timeout=max(0.0, end + STALL_SECONDS - time.monotonic())).not_done
        outcomes: dict[bytes, Verdict | Literal["late", "died"]] = {}
        for keys, future in futures:
            if future in pending:
                continue
            try:
                for key, score in zip(keys, future.result(), strict=False):
                    outcomes[key] = Verdict(*score) if score is not None else "late"
            except (ProcessExpired, BrokenProcessPool, CancelledError, TimeoutError):
                outcomes |= dict.fromkeys(keys, "died")
        if pending or "died" in outcomes.values():
            self.close()
        return outcomes

    def _job(self, prompt: Prompt, answer: str) -> rule_worker.Job:
        return prompt.answer, answer, _entry(prompt) if RULES[self._kind].by_entry else {}


def check_prompt(kind: str, place: str, prompt: Prompt) -> None:
    """Raises InputError where the prompt is a puzzle that the rule cannot score. place: of the prompt, for the message."""
    puzzle = _entry(prompt)["metadata"].get("source_dataset") if RULES[kind].by_entry else None
    if isinstance(puzzle, str) and puzzle in UNSCORABLE:
        raise InputError(
            f"{place}: metadata.source_dataset: {puzzle!r} cannot be scored ({UNSCORABLE[puzzle]}); leave such prompts out"
        )


def batch_time(answers: int, workers: int, timeout_seconds: float) -> float:
    """Seconds of a batch for which none are set."""
    return timeout_seconds + ANSWER_SECONDS * answers / workers


def _suspicion(answer: str) -> tuple[int, int]:
    """Grows with what makes answers slow: powers, factorials, length."""
    return answer.count("^") + answer.count("!"), len(answer)


def _key(kind: str, prompt: Prompt, answer: str) -> bytes:
    """Equal keys, equal verdicts. Where the rule looks at the entry, the metadata belongs to the key."""
    content = [kind, prompt.answer, answer, prompt.metadata if RULES[kind].by_entry else None]
    try:
        text = json.dumps(content, sort_keys=True, default=repr)
    except TypeError:  # JSON has no tuples for keys, and no order of 1 and "1"
        text = repr(content)
    return hashlib.sha256(text.encode()).digest()


def _entry(prompt: Prompt) -> dict[str, Any]:
    """The prompt as reasoning-gym's entry; its metadata may be the whole entry, or the entry's metadata."""
    metadata = prompt.metadata
    inner = metadata["metadata"] if "source_dataset" not in metadata and isinstance(metadata.get("metadata"), dict) else metadata
    return {"question": prompt.question, "answer": prompt.answer, "metadata": inner}


class _Pool:
    """A pebble pool, whose first workers are started by a thread that lives as long as the pool: the kernel kills a worker when
    the THREAD that started it ends (prctl PR_SET_PDEATHSIG), and the caller's may be a short one. Later workers are started by
    pebble's manager thread."""

    def __init__(self, kind: str, workers: int) -> None:
        self._kind = kind
        self._pool = ProcessPool(
            max_workers=workers, initializer=rule_worker.start, initargs=(kind, os.getpid()), context=MainlessSpawn()
        )
        self._started, self._stopped = threading.Event(), threading.Event()
        threading.Thread(target=self._keep, name="rule-pool-keeper", daemon=True).start()
        self._started.wait()

    def _keep(self) -> None:
        try:
            self._pool.active  # noqa: B018 - asking is what starts the workers
        finally:
            self._started.set()
        self._stopped.wait()

    @property
    def active(self) -> bool:
        return self._pool.active

    def submit(self, function: Callable[..., Any], timeout_seconds: float, *args: Any) -> Future:
        return self._pool.schedule(function, args=args, timeout=timeout_seconds)

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()
        self._stopped.set()
