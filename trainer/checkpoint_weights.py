"""A checkpoint's model weights without a policy, a process group or a second copy: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from rollout.weights.source import TensorMeta

PREFIX = "model.causal_lm."
"""Of a weight's name in a checkpoint (`trainer.checkpoint`, `trainer.policy.Policy`)."""


class CheckpointWeights:
    """`rollout.weights.source.WeightSource` of a complete checkpoint's folder, saved on any number of ranks. tied: the head is
    the embedding, and left out."""

    def __init__(self, checkpoint: Path, *, tied: bool) -> None:
        self._folder = checkpoint / "dcp"
        stored = FileSystemReader(self._folder).read_metadata().state_dict_metadata
        self._metadata = [
            TensorMeta(name.removeprefix(PREFIX), each.properties.dtype, tuple(each.size))
            for name, each in stored.items()
            if name.startswith(PREFIX) and not (tied and name == f"{PREFIX}lm_head.weight")
        ]

    def metadata(self) -> list[TensorMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for meta in self._metadata:
            tensor = torch.empty(meta.shape, dtype=meta.dtype)
            dcp.load({PREFIX + meta.name: tensor}, storage_reader=FileSystemReader(self._folder), no_dist=True)
            yield meta.name, tensor
