"""The process group of a run: NCCL on GPUs, gloo on CPUs, and a gloo group beside it for Python objects."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.errors import InputError
from rollout.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

MESH_NAMES = ("replicate", "shard")


@contextmanager
def process_group(timeout_seconds: float, shard_ranks: int | None = None) -> Iterator[tuple[Ranks, DeviceMesh, torch.device]]:
    """(ranks, mesh over all of them, this rank's device). From torchrun's environment; else one rank alone.

    shard_ranks: the mesh is (copies of the model, shards of each) where that is less than all ranks, else it has one dimension.
    Raises InputError where it does not divide them. A collective that waits longer than timeout_seconds raises.
    """
    cuda = torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_seconds)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    shape = mesh_shape(size, shard_ranks)
    options = {"init_method": "env://"} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, **options)
    try:
        objects = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        board = StoreBoard(dist.distributed_c10d._get_default_store(), rank, size) if size > 1 else None
        yield (
            Ranks(rank, size, objects, board),
            init_device_mesh(device.type, shape, mesh_dim_names=MESH_NAMES[-len(shape) :]),
            device,
        )
    finally:
        dist.destroy_process_group()


def mesh_shape(ranks: int, shard_ranks: int | None) -> tuple[int, ...]:
    """(shards,), or (copies, shards)."""
    shards = shard_ranks or ranks
    if ranks % shards:
        raise InputError(
            f"parallel.shard_ranks: {shards} does not divide the {ranks} ranks; set it to a divisor, or leave it out"
        )
    return (ranks,) if shards == ranks else (ranks // shards, shards)


class StoreBoard:
    """`rollout.deadline.Board` in the key-value store through which the ranks met."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.write(f"rank {rank}: start")

    def write(self, text: str) -> None:
        self._store.set(f"keju/board/{self._rank}", text)

    def read(self) -> list[str]:
        return [self._store.get(f"keju/board/{rank}").decode() for rank in range(self._size)]
