"""The transaction around a weight push: all ranks together, proved by a probe, repeated once, or the run stops.

    load        every rank's engine takes the weights; checksums of our own bytes on both sides (rollout.weights.wire)
    agree       all ranks learn whether all succeeded
    probe       each engine, and each server that took the weights, continues a fixed prompt; the policy scores what came; the
                log-probabilities must agree
    agree       all ranks learn whether all did, and which servers proved the weights: no other is asked until the next push

Where one rank fails, its engine is started anew and the push repeated for all; where that fails too, every rank raises.
The probe's prompt is longer than a block of the prefix cache and comes twice to each, so a cache that outlived the push shows.
Engines start with random weights, so on the first push the probe shows a tensor that never arrives on some path; later it shows
gross damage, and the checksums the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout.deadline import Deadline
from rollout.engine import Decoding, Engine, EngineError, Request, Several, drain
from rollout.ranks import Ranks
from rollout.types import Sample
from rollout.weights.source import TensorMeta, WeightSource

Score = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], list[np.ndarray]]
"""(prompts, responses), int32 each → float32 log-probabilities of each response's tokens under the policy, at temperature 1. A
collective: every rank calls it with as many sequences, its own."""


@dataclass(frozen=True, slots=True)
class Probe:
    """prompt: int32 [m]. bound: largest |engine - policy| in nats that passes."""

    prompt: np.ndarray
    bound: float
    new_tokens: int = 8
    copies: int = 2

    @classmethod
    def of(cls, vocabulary: int, length: int, bound: float) -> Probe:
        """A fixed random prompt of `length` tokens."""
        return cls(np.random.default_rng(0).integers(0, vocabulary, length, dtype=np.int32), bound)


class WeightSync:
    """One a rank. `push` and `recover` are collectives. seconds: deadline of each wait for an engine; a wait for another
    rank has twice that. asks: False on a rank whose engine samples nothing (`rollout.vllm.group`): the probe is the others'."""

    def __init__(
        self,
        engine: Engine,
        source: WeightSource,
        ranks: Ranks,
        *,
        score: Score | None = None,
        probe: Probe | None = None,
        seconds: float = 300.0,
        note: Callable[[str], None] = lambda _: None,
        asks: bool = True,
    ) -> None:
        self._engine, self._source, self._ranks = engine, source, ranks
        self._score, self._probe, self._seconds, self._note = score, probe, seconds, note
        self._asks = asks
        self._places = engine.places if isinstance(engine, Several) else 1
        self.version: int | None = None
        """Of the last push that was asked for."""
        self.worst: float | None = None
        """Largest difference that this rank's last probe showed, nats."""
        self.repeats = 0
        """Pushes that had to be repeated, over the run."""

    def push(self, version: int, advance: Callable[[int], object] = lambda _: None) -> None:
        """Every engine samples from `version` afterwards. Raises EngineError, on every rank, where a second attempt fails too."""
        self.version = version
        failed = self._attempt(version, advance)
        if not any(failed):
            return
        self.repeats += 1
        self._note(f"weights, version {version}: {_joined(failed)}; started anew, pushed again")
        self._restart(failed)
        failed = self._attempt(version, advance)
        if any(failed):
            raise EngineError(f"weights, version {version}: pushed twice without success: {_joined(failed)}")

    def measured(self) -> dict[str, float]:
        """For the metrics: the last probe's difference on this rank, in nats, and how many pushes had to be repeated so far."""
        probed = {} if self.worst is None else {"sync/probe": self.worst}
        return probed | {"sync/repeats": self.repeats}

    def recover(self, errors: Sequence[str | None]) -> None:
        """Engines were lost while they sampled (errors: by rank, None where all is well): starts them anew with the weights that
        they had. Raises EngineError, on every rank, where that fails."""
        self._note(f"{_joined(errors)}; started anew, weights of version {self.version} pushed again")
        self.repeats += 1
        self._restart(errors)
        self.push(self.version)

    def _attempt(self, version: int, advance: Callable[[int], object]) -> list[str | None]:
        """Why each rank failed; None where it did not."""
        failed = self._ranks.all_gather(self._ready())
        if any(failed):
            return failed
        failed = self._ranks.all_gather(self._load(version, advance))
        if any(failed) or self._probe is None or self._score is None:
            return failed
        with Deadline(2 * self._seconds, f"rank {self._ranks.rank}: probe of version {version}", self._ranks.board):
            proofs = self._ranks.all_gather(self._prove())
        if isinstance(self._engine, Several):
            self._engine.keep([name for _, names in proofs for name in names])
        return [error for error, _ in proofs]

    def _ready(self) -> str | None:
        try:
            self._engine.ready()
        except EngineError as error:
            return str(error)
        return None

    def _load(self, version: int, advance: Callable[[int], object]) -> str | None:
        call = f"rank {self._ranks.rank}: push of version {version}"
        # Twice, because a rank may wait for another that waits for its engine.
        with Deadline(2 * self._seconds, call, self._ranks.board) as deadline:
            try:
                self._engine.load(version, _Watched(self._source, deadline, advance))
            except (EngineError, ValueError) as error:
                return str(error)
        return None

    def _prove(self) -> tuple[str | None, list[str]]:
        """(what is wrong, the names of those that continued the probe)."""
        probe = self._probe
        error, continued = None, {}
        if self._asks:
            try:
                continued = self._continued()
            except EngineError as lost:
                error = str(lost)
        samples = [sample for each in continued.values() for sample in each]
        # As many on every rank, also on one that has none: the others wait for it in the scoring.
        filler = Sample(probe.prompt[:1], np.zeros(1, np.float32), "length", -1)
        samples += [filler] * (self._places * probe.copies - len(samples))
        scored = iter(self._score([probe.prompt] * len(samples), [sample.token_ids for sample in samples]))
        if not continued:
            return error, []
        gaps = {
            name: float(np.max([np.abs(sample.logprobs - next(scored)).max() for sample in each]))  # NaN stays NaN
            for name, each in continued.items()
        }
        self.worst = float(np.max(list(gaps.values())))
        off = [
            (f"{name}: " if name else "")
            + f"the engine's log-probabilities are off the policy's by {gap:.3g}, above {probe.bound:g}"
            for name, gap in gaps.items()
            if not gap <= probe.bound
        ]
        return f"rank {self._ranks.rank}: probe: {'; '.join(off)}" if off else None, list(gaps)

    def _continued(self) -> dict[str, list[Sample]]:
        """The probe's copies as each server, by its name, or the one engine, by none, continued them."""
        requests = [Request(self._probe.prompt, seed) for seed in range(self._probe.copies)]
        decoding = Decoding(self._probe.new_tokens, seed=1)
        if isinstance(self._engine, Several):
            return self._engine.sample_each(requests, decoding)
        return {"": drain(self._engine.submit(requests, decoding), len(requests))}

    def _restart(self, failed: Sequence[str | None]) -> None:
        error = None
        if failed[self._ranks.rank] is not None:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # a new engine has only what is free
            try:
                self._engine.restart()
            except EngineError as lost:
                error = str(lost)
        errors = self._ranks.all_gather(error)
        if any(errors):
            raise EngineError(f"an engine does not start again: {_joined(errors)}")


class _Watched:
    """A source that says where it is before each tensor."""

    def __init__(self, source: WeightSource, deadline: Deadline, advance: Callable[[int], object]) -> None:
        self._source, self._deadline, self._advance = source, deadline, advance
        self._metadata = source.metadata()

    def metadata(self) -> list[TensorMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tensors = iter(self._source)
        for meta in self._metadata:
            self._deadline.at(f"gathering {meta.name}")
            item = next(tensors, None)
            if item is None:
                return
            self._deadline.at(f"sending {meta.name}")
            yield item
            del item  # or two would be whole while the next is gathered
            self._advance(1)
        self._deadline.at("after the last tensor")
        yield from tensors


def _joined(errors: Sequence[str | None]) -> str:
    return "; ".join(error for error in errors if error is not None)
