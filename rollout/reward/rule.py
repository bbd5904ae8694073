"""Correctness by rule, behind a HARD time limit: a pool of worker processes, in which a late worker is killed and replaced.

A thread cannot be killed, and a signal handler waits for the C call that hangs; so a process it is.

The workers
- are spawned, not forked: a fork of a process with CUDA and threads inherits locks that nobody will open;
- do not import the program's `__main__` again, as spawned processes otherwise do: a trainer's main module would load torch into
  each worker. So the program needs no `if __name__ == "__main__"` for their sake, and nothing defined in `__main__` reaches them;
- ignore Ctrl-C and die with the process that made them, however that one ends.

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
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rollout.errors import InputError
from rollout.reward import rule_worker
from rollout.reward.spawn import MainlessSpawn
from rollout.types import Prompt, Verdict

START_SECONDS = 120.0
"""How long starting or replacing the workers may take on a slow machine (SymPy alone is a second of import on a fast one)."""

REPLACE_SECONDS = 5.0
"""How long one killed worker's replacement may take, for the bound on a whole batch."""


class RuleVerifier:
    """Judges answers by rule in worker processes. A context manager; `close` ends the workers.

    Verdict reasons: right, wrong, timeout (the worker was killed), error (no verdict: the scorer raised, the worker died, the
    ground truth is unreadable). Verdicts right and wrong are cached, the least recently used forgotten first; a timeout or error
    is tried anew in the next batch, since a busy machine may have caused it.
    """

    def __init__(self, kind: str, workers: int, timeout_seconds: float, *, cache_size: int = 65536) -> None:
        """kind: "math-verify", or "reasoning-gym" (the prompt's metadata is reasoning-gym's entry, or its metadata with
        source_dataset). timeout_seconds: for one answer, from its start in a worker.
        The workers start at once, and load their scorer beside whatever the caller does next.

        Raises InputError for an unknown kind, a missing package, no workers, no time.
        """
        if kind not in rule_worker.SCORERS:
            close = difflib.get_close_matches(kind, rule_worker.SCORERS, n=1, cutoff=0.0)
            raise InputError(f"reward.rule.kind: {kind!r} is no rule; the nearest is {close[0]!r}")
        package = rule_worker.SCORERS[kind]
        if importlib.util.find_spec(package) is None:
            raise InputError(f"reward.rule.kind: {kind!r} needs the package {package}; pip install {package.replace('_', '-')}")
        if workers < 1:
            raise InputError(f"reward.rule.workers: {workers} is too few; give it 1 or more")
        if not timeout_seconds > 0:
            raise InputError(f"reward.rule.timeout_seconds: {timeout_seconds} is no time; give it more than 0")
        self._kind, self._workers, self._timeout = kind, workers, timeout_seconds
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._cache_size = cache_size
        self._pool: _Pool | None = _Pool(kind, workers)

    def verify(self, pairs: list[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, answer), in order. One caller at a time.

        Equal pairs are checked once. With w workers and n different answers that all hang, it ends after about ⌈n / w⌉ ·
        (timeout_seconds + 1 s for a new worker). If the pool itself stalls, it is killed, and what is left counts as timeout.
        Raises RuntimeError where workers keep dying before they take any work.
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
        """A verdict for each job. A broken pool (an idle worker killed from outside breaks it) is replaced; its jobs go again."""
        verdicts: dict[bytes, Verdict] = {}
        for _ in range(3):
            left = {key: job for key, job in jobs.items() if key not in verdicts}
            if not left:
                return verdicts
            verdicts |= self._run_once(left)
        if len(verdicts) == len(jobs):
            return verdicts
        raise RuntimeError(f"the {self._kind} workers died three times before they took any work; their errors are on stderr")

    def _run_once(self, jobs: dict[bytes, tuple[Prompt, str]]) -> dict[bytes, Verdict]:
        if self._pool is None or not self._pool.active:
            self.close()
            self._pool = _Pool(self._kind, self._workers)
        try:
            futures = {key: self._pool.schedule(self._timeout, prompt, answer) for key, (prompt, answer) in jobs.items()}
        except RuntimeError:  # pebble's word for a pool that broke in between
            self.close()
            return {}
        rounds = -(-len(jobs) // self._workers)
        pending = self._wait(list(futures.values()), START_SECONDS + rounds * (self._timeout + REPLACE_SECONDS))
        if pending:
            self.close()
        verdicts = {}
        for key, future in futures.items():
            stalled = Verdict(False, "timeout", "the pool of workers stalled and was killed")
            verdict = stalled if future in pending else _verdict(future, self._timeout)
            if verdict is not None:
                verdicts[key] = verdict
        if len(verdicts) < len(jobs):
            self.close()
        return verdicts

    def _wait(self, futures: list[Future], seconds: float) -> set[Future]:
        """Until all are done, the time is over or the pool is dead; the futures that are not done."""
        deadline = time.monotonic() + seconds
        pending = set(futures)
        while pending and time.monotonic() < deadline:
            pending = wait(pending, timeout=min(1.0, max(0.0, deadline - time.monotonic()))).not_done
        return pending


def _verdict(future: Future, timeout_seconds: float) -> Verdict | None:
    """None where the pool broke before the job was done."""
    try:
        return Verdict(*future.result())
    except TimeoutError:
        return Verdict(False, "timeout", f"no verdict within {timeout_seconds:g} s")
    except ProcessExpired as expired:
        return Verdict(False, "error", f"the worker died (exit code {expired.exitcode})")
    except BrokenProcessPool:
        return None


def _key(kind: str, prompt: Prompt, answer: str) -> bytes:
    """Equal keys, equal verdicts. reasoning-gym judges by the puzzle, so its metadata belongs to the key."""
    metadata = prompt.metadata if kind == "reasoning-gym" else None
    text = json.dumps([kind, prompt.answer, answer, metadata], sort_keys=True, default=repr)
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

    def schedule(self, timeout_seconds: float, prompt: Prompt, answer: str) -> Future:
        entry = _entry(prompt) if self._kind == "reasoning-gym" else {}
        return self.submit(rule_worker.score, timeout_seconds, self._kind, prompt.answer, answer, entry)

    def submit(self, function: Callable[..., Any], timeout_seconds: float, *args: Any) -> Future:
        return self._pool.schedule(function, args=args, timeout=timeout_seconds)

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()
        self._stopped.set()
