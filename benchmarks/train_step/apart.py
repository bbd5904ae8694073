"""What must run in a process of its own: the planner, which pretends a process group, and the memory of a CPU process, in which
nothing else may have taken any.

    planned(config, ranks, device_type)   the trainer's memory by phase, from `trainer.planner.trace`
    resident(config)                      a process's resident set over a score and an update, above what it was before

Resident memory is measured as `benchmarks.kernels.memory` does: glibc gives back at once what a tensor gives back, and the kernel
is told to forget the peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from trainer.config import RunConfig

SECONDS = 900
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def planned(config: RunConfig, ranks: int, device_type: str) -> dict[str, Any]:
    """phase → {total: bytes, kinds: {kind: bytes}}."""
    return _child("planned", config, {"CUDA_VISIBLE_DEVICES": ""}, str(ranks), device_type)


def resident(config: RunConfig, threads: int) -> int:
    """Bytes."""
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    return _child("resident", config, {"CUDA_VISIBLE_DEVICES": "", **glibc}, str(threads))["risen"]


def _child(what: str, config: RunConfig, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Raises InputError where it fails, with the last line that it said."""
    ours = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    command = [sys.executable, "-m", "benchmarks.train_step.apart", what, *arguments]
    try:
        done = subprocess.run(
            command, input=config.model_dump_json(), env=ours | environment, capture_output=True, text=True, timeout=SECONDS,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(f"{what}: not done within {SECONDS} s; take a smaller model") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{what}: its process failed: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def _planned(config: RunConfig, ranks: int, device_type: str) -> dict[str, Any]:
    import torch

    from trainer.planner.trace import trace

    peaks = trace(config, config.model.path, ranks, getattr(torch, config.model.precision), device_type).stages[0].peaks
    return {phase: {"total": peak.total, "kinds": peak.kinds} for phase, peak in peaks.items()}


def _resident(config: RunConfig, threads: int) -> dict[str, Any]:
    import torch

    from benchmarks.kernels.memory import resident_bytes
    from benchmarks.train_step.bench import Bench, Figures
    from benchmarks.train_step.setting import way_of
    from trainer.distributed import process_group

    torch.set_num_threads(threads)
    if config.model.compile:
        torch.compile(lambda x: x + 1)(torch.ones(2))  # the compiler itself
    with process_group(600) as (ranks, mesh, device):
        before = resident_bytes("VmRSS")
        way = way_of(config.model)
        bench = Bench({way: config}, ranks, mesh, device)
        bench.use(way)
        if config.model.compile:
            bench.step(Figures())  # compiling takes memory that running does not
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        bench.step(Figures())
        return {"risen": resident_bytes("VmHWM") - before}


if __name__ == "__main__":
    asked = RunConfig.model_validate_json(sys.stdin.read())
    if sys.argv[1] == "planned":
        print(json.dumps(_planned(asked, int(sys.argv[2]), sys.argv[3])))
    else:
        print(json.dumps(_resident(asked, int(sys.argv[2]))))
