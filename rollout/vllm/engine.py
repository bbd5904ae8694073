"""Engine `vllm`, colocated: one vLLM beside each rank, in a process of its own, on the rank's device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.engine import Decoding, EngineError, Progress, Request, drain
from rollout.types import Sample
from rollout.vllm.channel import Message
from rollout.vllm.child import VllmChild
from rollout.weights.push import Sender
from rollout.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. See `trainer.config.EngineConfig`."""

    start: float = 600.0
    silence: float = 300.0
    sync: float = 300.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Of a sequence of n tokens, about all but its first: log-probabilities at temperature 1, in nats, float32 [n - 1], of the
    token that is there, given those before it, and of the likeliest one."""

    logprobs: np.ndarray
    best: np.ndarray


class VllmEngine:
    """start: makes the process; called at once, and again at each restart. end_token_ids: any of them ends an output. sleeps:
    whether the engine gives its device's memory back between rollouts."""

    name = "vllm"
    streams = True

    def __init__(
        self,
        start: Callable[[], VllmChild],
        sender: Sender,
        *,
        end_token_ids: Sequence[int],
        deadlines: Deadlines | None = None,
        sleeps: bool = False,
    ) -> None:
        self._start, self._sender, self._sleeps = start, sender, sleeps
        self._end_token_ids = sorted(set(end_token_ids))
        self._deadlines = deadlines or Deadlines()
        self._child = start()
        self._version: int | None = None
        self._asleep = False

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def pid(self) -> int:
        """Of the process that holds vLLM."""
        return self._child.pid

    def ready(self) -> None:
        """See `rollout.engine.Engine.ready`."""
        self._child.wait_ready(self._deadlines.start)

    def load(self, version: int, source: WeightSource) -> None:
        """See `rollout.engine.Engine.load`."""
        self._version = None
        receiver = _ChildReceiver(self)
        errors = self._sender.send(version, source, [receiver])
        if errors:
            raise next(iter(errors.values()))
        self._version = version

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> VllmGeneration:
        """See `rollout.engine.Engine.submit`."""
        if self._version is None:
            raise EngineError(f"{self._child.name}: its weights are of no known version; a push must come first")
        described = _described(decoding) | {"end_token_ids": self._end_token_ids}
        return VllmGeneration(self._child, requests, described, self._version, self._deadlines.silence, progress)

    def generate(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> list[Sample]:
        """All at once, in order."""
        return drain(self.submit(requests, decoding, progress), len(requests))

    def score(self, sequences: Sequence[np.ndarray], progress: Progress | None = None) -> list[Scores]:
        """Of each sequence, int32 [n], 2 ≤ n < the engine's longest: it makes a token behind. Not during a generation. Raises
        EngineError."""
        if self._version is None:
            raise EngineError(f"{self._child.name}: its weights are of no known version; a push must come first")
        arrays = _packed([Request(sequence) for sequence in sequences], 0)
        arrays.pop("seeds")
        self._child.send("score", version=self._version, arrays=arrays)
        scores: dict[int, Scores] = {}
        while len(scores) < len(sequences):
            message = self._child.receive(self._deadlines.silence, "score")
            if message is None:
                missing = len(sequences) - len(scores)
                raise EngineError(f"{self._child.name}: silent for {self._deadlines.silence:g} s during score, {missing} missing")
            if message["kind"] != "scores":
                continue
            ends = np.cumsum(message["lengths"])
            for place, start, end in zip(message["places"].tolist(), ends - message["lengths"], ends, strict=True):
                scores[place] = Scores(message["logprobs"][start:end].copy(), message["best"][start:end].copy())
            if progress is not None:
                progress(len(ends), int(ends[-1]))
        return [scores[place] for place in range(len(sequences))]

    def sleep(self) -> None:
        """See `rollout.engine.Engine.sleep`."""
        if self._sleeps and not self._asleep:
            self._version = None
            try:
                self._child.ask("sleep", self._deadlines.sync, level=2)
            except EngineError:
                # Not this rank's alone to raise. Its memory is free now, and the next push finds it gone and starts another.
                self._child.kill()
            self._asleep = True

    def restart(self) -> None:
        """See `rollout.engine.Engine.restart`."""
        self._version, self._asleep = None, False
        self._child.kill()
        self._child = self._start()
        self.ready()

    def close(self) -> None:
        self._version = None
        self._child.close()
        self._sender.close()


class StoredVllmEngine(VllmEngine):
    """Samples from the folder's own weights as they are stored: quantized ones, which no push could bring. start: with
    `VllmSettings.stored`. `load` takes nothing from its source: it names a version for what is there."""

    def load(self, version: int, source: WeightSource) -> None:  # noqa: ARG002 - there is nothing to take
        """See `rollout.engine.Engine.load`."""
        self._version = None
        self.ready()
        self._child.ask("adopt", self._deadlines.sync, version=version)
        self._version = version


class _ChildReceiver:
    """`rollout.weights.push.Receiver`."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine, self._child, self._seconds = engine, engine._child, engine._deadlines.sync
        self.name = engine._child.name
        self.workers = 1
        self.identity = engine._child.pid

    def begin(self, version: int, manifest: list[dict[str, Any]]) -> None:
        self._engine.ready()
        if self._engine._asleep:
            self._child.ask("wake", self._seconds, tags=["weights"])
        self._child.ask("begin", self._seconds, version=version, manifest=manifest)

    def connect(self, info: dict[str, Any]) -> None:
        self._child.ask("connect", self._seconds, info=info)

    def chunk(self, chunk: dict[str, Any]) -> None:
        self._child.ask("chunk", self._seconds, chunk=chunk)

    def commit(self, version: int) -> None:
        if self._engine._asleep:
            self._child.ask("wake", self._seconds, tags=["kv_cache"])
            self._engine._asleep = False
        self._child.ask("commit", self._seconds, version=version)


class VllmGeneration:
    """`rollout.engine.Generation`. Once it has raised EngineError, its `abort` asks the process nothing: one that hangs would be
    silent for as long again, while the other ranks wait, and it is started anew whatever it says."""

    def __init__(
        self,
        child: VllmChild,
        requests: Sequence[Request],
        decoding: dict[str, Any],
        version: int,
        silence: float,
        progress: Progress | None,
    ) -> None:
        self._child, self._version, self._silence, self._progress = child, version, silence, progress
        self._decoding = decoding
        self._submitted = 0
        self._left: set[int] = set()
        self._lost = False
        self.add(requests)

    @property
    def done(self) -> bool:
        return not self._left

    def add(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        arrays = _packed(requests, self._submitted)
        self._left |= set(arrays["places"].tolist())
        self._submitted += len(requests)
        self._heard = time.monotonic()
        with self._noticing():
            self._child.send("generate", version=self._version, decoding=self._decoding, arrays=arrays)

    def poll(self, seconds: float) -> list[tuple[int, Sample]]:
        with self._noticing():
            return self._poll(seconds)

    def abort(self) -> None:
        if self._left and not self._lost:
            self._child.ask("abort", self._silence, expected="aborted")
        self._left.clear()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except EngineError:
            self._lost = True
            raise

    def _poll(self, seconds: float) -> list[tuple[int, Sample]]:
        deadline = time.monotonic() + seconds
        finished: list[tuple[int, Sample]] = []
        while self._left:
            # What has come already is taken without waiting; for the first sample there is patience.
            wait = 0.0 if finished else max(0.0, deadline - time.monotonic())
            message = self._child.receive(wait, "generate")
            if message is None:
                break
            self._heard = time.monotonic()
            finished += self._take(message)
        if self._left and time.monotonic() - self._heard > self._silence:
            raise EngineError(
                f"{self._child.name}: silent for {self._silence:g} s during generate, {len(self._left)} outputs missing"
            )
        return finished

    def _take(self, message: Message) -> list[tuple[int, Sample]]:
        if message["kind"] == "progress":
            self._report(0, message["tokens"])
            return []
        if message["kind"] != "samples":
            raise EngineError(f"{self._child.name}: answered generate with {message['kind']!r}")
        if message["version"] != self._version:
            raise EngineError(f"{self._child.name}: sampled from version {message['version']}, asked for {self._version}")
        return self._unpack(message)

    def _unpack(self, message: Message) -> list[tuple[int, Sample]]:
        ends = np.cumsum(message["lengths"])
        starts = ends - message["lengths"]
        finished = []
        for place, start, end, reason in zip(message["places"].tolist(), starts, ends, message["reasons"], strict=True):
            if reason not in ("stop", "length") or place not in self._left:
                raise EngineError(f"{self._child.name}: output {place} ended with {reason!r}, or came twice")
            self._left.remove(place)
            tokens, logprobs = message["tokens"][start:end].copy(), message["logprobs"][start:end].copy()
            finished.append((place, Sample(tokens, logprobs, reason, self._version)))
        self._report(len(finished), 0)
        return finished

    def _report(self, outputs: int, tokens: int) -> None:
        if self._progress is not None:
            self._progress(outputs, tokens)


def _described(decoding: Decoding) -> dict[str, Any]:
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "greedy": decoding.greedy,
    }


def _packed(requests: Sequence[Request], first_place: int) -> dict[str, np.ndarray]:
    return {
        "prompts": np.concatenate([request.prompt_token_ids for request in requests]).astype(np.int32),
        "lengths": np.asarray([len(request.prompt_token_ids) for request in requests], dtype=np.int64),
        "places": np.arange(first_place, first_place + len(requests), dtype=np.int64),
        "seeds": np.asarray([request.seed for request in requests], dtype=np.int64),
    }
