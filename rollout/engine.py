"""What an inference engine is to the rest: token ids in, token ids with log-probabilities and a weight version out.

engine.load(version, source)                      # collective: every rank iterates the source to its end
generation = engine.submit(requests, decoding)
while not generation.done:
    for place, sample in generation.poll(0.5): …
    generation.add(more)                          # where the engine streams
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rollout.errors import EngineError
from rollout.types import Sample
from rollout.weights.source import WeightSource

__all__ = ["BatchGeneration", "Decoding", "Engine", "EngineError", "Generation", "Progress", "Request", "Several", "drain"]


@dataclass(frozen=True, slots=True)
class Request:
    """One output to sample. prompt_token_ids: int32 [m], m ≥ 1."""

    prompt_token_ids: np.ndarray
    seed: int = 0
    """Of this output alone, in [0, 2^63); for engines that draw each output from a generator of its own (vLLM)."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to sample. top_p < 1 and greedy are for evaluation: a loss must see the distribution that was sampled from."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    """Of the whole batch on this rank, for engines that draw all outputs from one generator (transformers). Same seeds, same
    requests, same weights: same samples, where the engine is repeatable."""


Progress = Callable[[int, int], None]
"""Called with (outputs finished, tokens sampled) since the last call; (0, 0) says only that it gets on. Where the engine does not
stream, what it raises ends the generation."""


class Generation(Protocol):
    """Requests under way."""

    @property
    def done(self) -> bool:
        """Nothing more will come: every request was delivered, or the rest aborted."""
        ...

    def add(self, requests: Sequence[Request]) -> None:
        """More requests, decoded as the first ones; their places follow on. Only where the engine streams. Raises EngineError."""
        ...

    def poll(self, seconds: float) -> list[tuple[int, Sample]]:
        """(place in the submitted requests, sample) of what has finished since the last call; waits up to `seconds` for the
        first. Each place comes once. Raises EngineError where the engine is lost: what was not delivered will not come."""
        ...

    def abort(self) -> None:
        """Drops what is unfinished; `done` holds afterwards. What had finished but was not polled is dropped too."""
        ...


class Engine(Protocol):
    """An engine on one rank. `load` comes before the first `submit`. One generation at a time; none during a load."""

    name: str
    streams: bool
    """Whether outputs come one by one while others decode, and can be aborted; else `poll` blocks for a batch."""

    @property
    def version(self) -> int | None:
        """Of the weights it would sample from; None where that is unknown, and then `submit` raises EngineError."""
        ...

    def ready(self) -> None:
        """Waits until it can take weights. Raises EngineError where it does not come up in time."""
        ...

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> Generation: ...

    def load(self, version: int, source: WeightSource) -> None:
        """Takes whole weights under the model's own parameter names, all or none: afterwards `version` is the new one, or None
        and an exception was raised (ValueError for a name or shape that does not fit or is missing; EngineError for the rest). A
        collective: raises only after the source was iterated to its end, so that no other rank is left waiting."""
        ...

    def sleep(self) -> None:
        """Gives its device's memory back until the next `load`, where it can; else does nothing."""
        ...

    def restart(self) -> None:
        """Makes a lost engine usable again, without weights: a `load` must follow. Raises EngineError where that fails."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Several(Protocol):
    """What an `Engine` over servers has besides: each holds weights of its own, and a push is to be proved on each."""

    @property
    def places(self) -> int:
        """Servers, whatever they hold; on every rank the same number."""
        ...

    def sample_each(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, list[Sample]]:
        """By name, of each server that took the last load, its own samples of the requests, in order. Nothing on a rank that does
        not push. Raises EngineError where no server answers."""
        ...

    def keep(self, names: Collection[str]) -> None:
        """The servers that proved the weights: no other samples until the next load."""
        ...


class BatchGeneration:
    """`Generation` of an engine that does not stream: the first `poll` samples everything.

    sample: (requests, decoding, progress) → their samples, in order."""

    def __init__(
        self,
        sample: Callable[[Sequence[Request], Decoding, Progress | None], list[Sample]],
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None,
    ) -> None:
        self._sample, self._requests, self._decoding, self._progress = sample, requests, decoding, progress

    @property
    def done(self) -> bool:
        return not self._requests

    def add(self, requests: Sequence[Request]) -> None:
        raise NotImplementedError("the embedded engine samples a batch at once; submit another")

    def poll(self, seconds: float) -> list[tuple[int, Sample]]:  # noqa: ARG002 - it samples until it is done
        requests, self._requests = self._requests, ()
        return list(enumerate(self._sample(requests, self._decoding, self._progress)))

    def abort(self) -> None:
        self._requests = ()


def drain(generation: Generation, count: int) -> list[Sample]:
    """All `count` samples, in the order of their requests."""
    samples: list[Sample | None] = [None] * count
    while not generation.done:
        for place, sample in generation.poll(1.0):
            samples[place] = sample
    return samples
