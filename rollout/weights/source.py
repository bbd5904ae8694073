"""What a trainer offers to be sent: names, shapes, and one pass over whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One whole parameter. name: the Hugging Face checkpoint's own."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class WeightSource(Protocol):
    """A model's weights, whole, one at a time. Each `iter()` is a fresh pass and a collective: all ranks iterate in lockstep."""

    def metadata(self) -> list[TensorMeta]:
        """What an iteration yields, in order, without gathering anything."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def take(source: WeightSource, parameters: dict[str, Tensor]) -> None:
    """Copies whole weights into an engine's parameters, by name, for `rollout.engine.Engine.load` of a model in this process.

    Iterates to the end whatever comes. Raises ValueError for a name or shape that does not fit or is missing; the parameters are
    then part new, part old."""
    expected, problem = dict(parameters), ""
    for name, weight in source:
        target = expected.pop(name, None)
        if target is None:
            problem = problem or f"weight {name!r} is not one of the engine's or came twice"
        elif target.shape != weight.shape:
            problem = problem or f"weight {name!r} has shape {tuple(weight.shape)}, the engine's {tuple(target.shape)}"
        else:
            target.copy_(weight)
    if problem or expected:
        raise ValueError(problem or f"weights {sorted(expected)[:3]} ({len(expected)} in all) did not come")


def layers(metadata: list[TensorMeta]) -> list[list[TensorMeta]]:
    """Consecutive tensors of one decoder layer together, each of the others (embedding, norm, head) alone: what may not be
    torn apart in a transfer, and the most that is whole at a time."""
    groups: list[list[TensorMeta]] = []
    last = None
    for meta in metadata:
        key = _layer_of(meta.name)
        if key is None or key != last:
            groups.append([])
        groups[-1].append(meta)
        last = key
    return groups


def _layer_of(name: str) -> str | None:
    """'model.layers.3' of 'model.layers.3.mlp.up_proj.weight'; None outside the layers."""
    parts = name.split(".")
    place = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])
