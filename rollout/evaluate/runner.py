"""Samples and grades a benchmark's outputs that are not kept yet; each is on disk before the next are waited for.

What an output is drawn from depends on nothing but (seed, benchmark, question, sample), so a continued evaluation gives what an
unbroken one would. An engine that decodes each request by itself gets all that is missing, each with a seed of its own. The
embedded engine draws a batch from one generator: for it the work is cut into the same batches each time, each with a seed of
its own, and a batch of which an output is missing is sampled whole again.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout.engine import Decoding, Engine, EngineError, Progress, Request
from rollout.evaluate.benchmarks import Benchmark
from rollout.evaluate.record import Record
from rollout.lane import Job, Judge, Judged, Lane
from rollout.weights.sync import WeightSync

RESTARTS = 3
"""Times that a lost engine is started anew in one benchmark before the evaluation stops."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Parts:
    """encoded: token ids of each of a benchmark's prompts, int32 [m] each, by its name. tokens_per_batch: the embedded
    engine's."""

    engine: Engine
    sync: WeightSync
    judge: Judge
    record: Record
    encoded: dict[str, list[np.ndarray]]
    decoding: Decoding
    seed: int
    tokens_per_batch: int


def sample(benchmark: Benchmark, parts: Parts, progress: Progress, finished: Callable[[int], None]) -> None:
    """Until every output of the benchmark is kept. finished: told how many more are.

    Raises EngineError where the engine is lost for good; what it had sampled is graded and kept.
    """
    start = time.perf_counter()
    restarts = RESTARTS

    def keep(judged: Sequence[Judged]) -> None:
        before = len(parts.record.outcomes(benchmark.name))
        rows = [(each.place, each.output, benchmark.prompts[each.place], each.sample, each.verdict) for each in judged]
        parts.record.append(benchmark.name, rows, time.perf_counter() - start)
        finished(len(parts.record.outcomes(benchmark.name)) - before)

    for jobs, seed in portions(benchmark, parts):
        decoding = replace(parts.decoding, seed=seed)
        with Lane(parts.engine, parts.judge, progress) as lane:
            to_ask: Sequence[Job] = jobs
            while to_ask or not lane.done:
                try:
                    if to_ask:
                        lane.add(to_ask, decoding)
                        to_ask = ()
                    keep(lane.poll(POLL_SECONDS))
                except EngineError as lost:
                    to_ask = lane.unsampled()
                    with contextlib.suppress(EngineError):
                        lane.abort()
                    try:
                        if not restarts:
                            raise EngineError(f"{lost}, after {RESTARTS} restarts") from None
                        parts.sync.recover([str(lost)])
                    except EngineError:
                        while not lane.done:  # what was sampled is still being graded
                            keep(lane.poll(POLL_SECONDS))
                        raise
                    restarts -= 1


def portions(benchmark: Benchmark, parts: Parts) -> Iterator[tuple[list[Job], int]]:
    """(jobs to be submitted together, the seed of a generator that they share), of those portions in which something is
    missing."""
    kept = parts.record.outcomes(benchmark.name)
    encoded = parts.encoded[benchmark.name]
    places = [(question, number) for question in range(len(benchmark.prompts)) for number in range(benchmark.k)]
    if parts.engine.streams:
        batches = [[place for place in places if place not in kept]]
    else:
        longest = max(len(ids) for ids in encoded) + parts.decoding.max_new_tokens
        size = max(1, parts.tokens_per_batch // longest)
        batches = [places[start : start + size] for start in range(0, len(places), size)]
    for number, batch in enumerate(batches):
        if all(place in kept for place in batch):
            continue
        seeds = [seed_of(parts.seed, benchmark.name, *place) for place in batch]
        jobs = [
            Job(question, output, benchmark.prompts[question], Request(encoded[question], seed))
            for (question, output), seed in zip(batch, seeds, strict=True)
        ]
        yield jobs, seed_of(parts.seed, benchmark.name, number)


def seed_of(seed: int, name: str, *place: int) -> int:
    """In [0, 2^63)."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return int(np.random.SeedSequence([seed, word, len(place), *place]).generate_state(1, np.uint64)[0] >> 1)
