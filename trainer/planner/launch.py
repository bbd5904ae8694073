"""The planner's check at a launch on GPUs: what cannot fit is refused before a model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace

from rollout.cli import EXIT_INPUT
from rollout.errors import InputError

PREFIX = "keju: error: "


def check_memory(options: Namespace) -> None:
    """Plans the launch's configuration for its ranks and this rank's GPU; nothing on a CPU. Raises InputError with its line.

    In a process of its own, which sees no GPU and none of this one's process groups.
    """
    memory = gpu_memory()
    if memory is None:
        return
    ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    command = [sys.executable, "-m", "trainer.plan", str(options.config), *options.overrides]
    command += ["--gpus", str(ranks), "--memory", str(memory), "--json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    if found.returncode == EXIT_INPUT:
        raise InputError(found.stderr.strip().rpartition("\n")[2].removeprefix(PREFIX))
    if found.returncode:
        raise RuntimeError(f"trainer.plan ended with exit code {found.returncode}:\n{found.stderr}")


def gpu_memory() -> int | None:
    """Bytes of this rank's GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
