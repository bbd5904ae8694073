"""One rank's share of the sampling: its engine decodes, and a thread judges what has finished while the rest still decodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from rollout.deadline import Deadline
from rollout.engine import Decoding, Engine, Generation, Progress, Request
from rollout.types import Prompt, Sample, Verdict


class Judge(Protocol):
    """`rollout.reward.pipeline.Reward` is one. Called from one thread at a time."""

    def judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Verdict]: ...


MOST = 256
"""Outputs judged in one call: its deadlines hold for all of them, however many have come while the judge was busy."""


@dataclass(frozen=True, slots=True)
class Job:
    """One output to sample. place: of its prompt among the prompts drawn; output: which of the G."""

    place: int
    output: int
    prompt: Prompt
    request: Request


@dataclass(frozen=True, slots=True)
class Judged:
    """A job's outcome, as it travels to rank 0."""

    place: int
    output: int
    sample: Sample
    verdict: Verdict


class Lane:
    """A context manager; the judging thread ends with it. `judging`: seconds that it has judged; `waited`: seconds of them that
    the rank had nothing else to wait for. judge_seconds: by the number of outputs, deadline of one call of the judge, past
    which the process ends (`rollout.deadline`); the verifiers' own are shorter, this one is for what they do not hold. None: no
    deadline."""

    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        progress: Progress,
        *,
        overlap: bool = True,
        judge_seconds: Callable[[int], float] | None = None,
    ) -> None:
        self._judge_seconds = judge_seconds
        self._engine, self._judge, self._progress, self._overlap = engine, judge, progress, overlap
        self._generation: Generation | None = None
        self._jobs: list[Job] = []
        """Of the generation, by place in it."""
        self._unsampled: dict[tuple[int, int], Job] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keju-judge")
        self._held: list[tuple[Job, Sample]] = []
        """What waits to be judged: while the judge is busy; without overlap, until all is sampled."""
        self._lock = threading.Lock()
        """Of _held, which the judging thread empties."""
        self._verdicts: list[Future[list[Judged]]] = []
        self.judging = 0.0
        self.waited = 0.0

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def done(self) -> bool:
        return not self._unsampled and not self._verdicts

    def add(self, jobs: Sequence[Job], decoding: Decoding) -> None:
        """decoding: the same at every call, but for its seed. Raises EngineError; the jobs are then `unsampled`."""
        if not jobs:
            return
        self._unsampled |= {(job.place, job.output): job for job in jobs}
        if self._generation is None or self._generation.done:
            self._jobs = list(jobs)
            self._generation = self._engine.submit([job.request for job in jobs], decoding, self._progress)
        else:
            self._jobs += jobs
            self._generation.add([job.request for job in jobs])

    def poll(self, seconds: float) -> list[Judged]:
        """What was judged since the last call; waits up to `seconds` where there is nothing to do. Raises EngineError where the
        engine is lost; what had finished before is judged and comes with the next call."""
        if self._unsampled:
            assert self._generation is not None
            finished = [(self._jobs[at], sample) for at, sample in self._generation.poll(seconds)]
            for job, _ in finished:
                del self._unsampled[job.place, job.output]
            with self._lock:
                self._held += finished
                turns = -(-len(self._held) // MOST)
            if finished and (self._overlap or not self._unsampled):
                self._verdicts += [self._thread.submit(self._judge_next) for _ in range(turns)]
        elif self._verdicts:
            start = time.perf_counter()
            wait(self._verdicts[:1], timeout=seconds)
            self.waited += time.perf_counter() - start
        judged: list[Judged] = []
        while self._verdicts and self._verdicts[0].done():
            judged += self._verdicts.pop(0).result()
        return judged

    def unsampled(self) -> list[Job]:
        """In the order they were added."""
        return list(self._unsampled.values())

    def abort(self) -> None:
        """Drops what is not sampled; what is sampled is still judged. Raises EngineError."""
        generation, self._generation = self._generation, None
        self._unsampled = {}
        if generation is not None:
            generation.abort()

    def _judge_next(self) -> list[Judged]:
        """What waits, in one call: an endpoint that hangs then costs one time-out, not one for each poll meanwhile, whose own
        turns find nothing left."""
        with self._lock:
            finished, self._held = self._held[:MOST], self._held[MOST:]
        if not finished:
            return []
        start = time.perf_counter()
        limit = nullcontext()
        if self._judge_seconds is not None:
            limit = Deadline(self._judge_seconds(len(finished)), f"judging {len(finished)} outputs")
        with limit:
            verdicts = self._judge.judge([(job.prompt, sample) for job, sample in finished])
        self.judging += time.perf_counter() - start
        return [Judged(job.place, job.output, sample, verdict) for (job, sample), verdict in zip(finished, verdicts, strict=True)]
