"""What an inference engine is to the rest: token ids in, token ids with log-probabilities and a weight version out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from rollout.types import Sample


@dataclass(frozen=True, slots=True)
class Request:
    """One output to sample. prompt_token_ids: int32 [m], m ≥ 1."""

    prompt_token_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to sample. top_p < 1 and greedy are for evaluation: a loss must see the distribution that was sampled from."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    """Same seed, same requests, same weights: same samples."""


Progress = Callable[[int, int], None]
"""Called with (outputs finished, tokens sampled) since the last call."""


class Engine(Protocol):
    """An engine on one rank. `load` comes before the first `generate`."""

    name: str

    def generate(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> list[Sample]:
        """One sample a request, in order, each marked with the weight version that sampled it."""
        ...

    def load(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes whole weights under the model's own parameter names. Every rank iterates to the end: making a weight whole is a
        collective. Raises ValueError for a name or shape that does not fit, or one that is missing; `generate` then refuses
        until a load succeeds."""
        ...

    def close(self) -> None: ...
