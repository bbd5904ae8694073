"""A checkpoint's model weights without a policy, a process group or a second copy: a GiB, or one tensor, in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rollout.weights.source import TensorMeta
from trainer.checkpoint_tensors import Reader

BATCH_BYTES = 1 << 30
PREFIX = "model.causal_lm."
"""Of a weight's name in a checkpoint (`trainer.checkpoint`, `trainer.policy.Policy`)."""


class CheckpointWeights:
    """`rollout.weights.source.WeightSource` of a complete checkpoint's folder, saved on any number of ranks. tied: the head is
    the embedding, and left out."""

    def __init__(self, checkpoint: Path, *, tied: bool) -> None:
        self._checkpoint = checkpoint
        stored = Reader(checkpoint).read_metadata().state_dict_metadata
        self._metadata = [
            TensorMeta(name.removeprefix(PREFIX), each.properties.dtype, tuple(each.size))
            for name, each in stored.items()
            if name.startswith(PREFIX) and not (tied and name == f"{PREFIX}lm_head.weight")
        ]

    def metadata(self) -> list[TensorMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for batch in self._batches():
            tensors = {meta.name: torch.empty(meta.shape, dtype=meta.dtype) for meta in batch}
            wanted = {PREFIX + name: tensor for name, tensor in tensors.items()}
            dcp.load(wanted, storage_reader=Reader(self._checkpoint), no_dist=True)
            yield from tensors.items()

    def _batches(self) -> Iterator[list[TensorMeta]]:
        """Loaded at once: each load reads the checkpoint's index."""
        batch: list[TensorMeta] = []
        for meta in self._metadata:
            if batch and sum(each.elements * each.dtype.itemsize for each in [*batch, meta]) > BATCH_BYTES:
                yield batch
                batch = []
            batch.append(meta)
        if batch:
            yield batch
