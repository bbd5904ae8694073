"""The process group of a run: NCCL on GPUs, gloo on CPUs, and a gloo group beside it for Python objects."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[tuple[Ranks, DeviceMesh, torch.device]]:
    """(ranks, one-dimensional mesh over all of them, this rank's device). From torchrun's environment; else one rank alone.

    A collective that waits longer than timeout_seconds raises.
    """
    cuda = torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_seconds)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    options = {"init_method": "env://"} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, **options)
    try:
        objects = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        yield Ranks(rank, size, objects), init_device_mesh(device.type, (size,)), device
    finally:
        dist.destroy_process_group()
