"""The process group of a run: NCCL on GPUs, gloo on CPUs, and a gloo group beside it for Python objects."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer.fresh_store import fresh_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.watch import Watch

MESH_NAMES = ("replicate", "shard")
BOARD_SECONDS = 30.0
"""For a word of the store that serves as board."""


@contextmanager
def process_group(
    timeout_seconds: float, shard_ranks: int | None = None, watch: Watch | None = None
) -> Iterator[tuple[Ranks, DeviceMesh, torch.device]]:
    """(ranks, mesh over all of them, this rank's device). From torchrun's environment; else one rank alone.

    shard_ranks: the mesh is (copies of the model, shards of each) where that is less than all ranks, else it has one dimension.
    Raises InputError where it does not divide them. A collective that waits longer than timeout_seconds raises; under a watch,
    which has the same deadline and says more, later than that.
    """
    cuda = torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_seconds if watch is None else unwatched_seconds(timeout_seconds))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    shape = mesh_shape(size, shard_ranks)
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
    failed = True
    try:
        with fresh_store(store, rank, size) as fresh:
            board = StoreBoard(fresh, rank, size) if size > 1 else None
            if watch is not None and board is not None:
                watch.join(board)
            place = {"store": dist.PrefixStore("default_pg", fresh), "rank": rank, "world_size": size}
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, **place)
            objects = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        if watch is not None:
            watch.met()
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=MESH_NAMES[-len(shape) :])
        for name in mesh.mesh_dim_names if size > 1 else ():  # these know torch's own: 10 minutes for NCCL
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
        yield Ranks(rank, size, objects, board, *(() if watch is None else (watch.main,))), mesh, device
        failed = False
    finally:
        if dist.is_initialized() and not (failed and cuda):
            dist.destroy_process_group()  # over NCCL it waits for ranks that may sit in a collective for ever


def mesh_shape(ranks: int, shard_ranks: int | None) -> tuple[int, ...]:
    """(shards,), or (copies, shards)."""
    shards = shard_ranks or ranks
    if ranks % shards:
        raise InputError(
            f"parallel.shard_ranks: {shards} does not divide the {ranks} ranks; set it to a divisor, or leave it out"
        )
    return (ranks,) if shards == ranks else (ranks // shards, shards)


def unwatched_seconds(timeout_seconds: float) -> float:
    """For a collective that something else watches: late enough for its report to come first."""
    return 2 * timeout_seconds + 60


class StoreBoard:
    """`rollout.deadline.Board` and `trainer.watch.RunBoard` in the key-value store through which the ranks meet. Each thread has
    a connection of its own: one that waits would keep the others waiting."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._own = threading.local()
        self.write(f"rank {rank}: start")

    def write(self, text: str) -> None:
        self.set(f"board/{self._rank}", text)

    def read(self) -> list[str]:
        return [self.get(f"board/{rank}") or f"rank {rank}: not there yet" for rank in range(self._size)]

    def set(self, key: str, text: str) -> None:
        self._connection().set(f"keju/{key}", text)

    def get(self, key: str) -> str | None:
        """None where nobody has set it."""
        connection = self._connection()
        return connection.get(f"keju/{key}").decode() if connection.check([f"keju/{key}"]) else None

    def claim(self, key: str) -> bool:
        return self._connection().add(f"keju/{key}", 1) == 1

    def _connection(self) -> dist.Store:
        if not hasattr(self._own, "store"):
            self._own.store = self._store.clone()
            self._own.store.set_timeout(timedelta(seconds=BOARD_SECONDS))
        return self._own.store
