"""`python -m benchmarks.checkpoint`: how long a save holds a run up, and how long it is being written.

A state like that of training with AdamW in fp32, weights and two moments, 12 bytes a parameter, sharded over RANKS processes of
this machine, is saved as the trainer does (`trainer.checkpoint`): at once, and beside the run. Each way in turn, `--rounds` times
after a first save, which takes the host memory for the copy; every save is finished before the next begins.

    stall    seconds until the run goes on
    write    seconds until the checkpoint stands, on the disk and with its checksums
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rollout.cli import Parser
from rollout.environment import provenance
from rollout.errors import InputError
from trainer import cli
from trainer.adamw8bit import local
from trainer.checkpoint import Checkpoints, RunState
from trainer.checkpoint_folder import free_bytes
from trainer.config import CheckpointConfig
from trainer.distributed import process_group
from trainer.optimizer import make_moments

WIDTH = 2048
WAYS = {"at once": False, "beside the run": True}
"""checkpoint.asynchronous."""


class State:
    """As much of an actor as a checkpoint takes: square layers of WIDTH · WIDTH parameters, and their moments."""

    def __init__(self, parameters: int, mesh: DeviceMesh, device: torch.device) -> None:
        self.policy = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(parameters // WIDTH**2)))
        for layer in self.policy:
            fully_shard(layer, mesh=mesh)
        self.optimizer, self.updates = torch.optim.AdamW(self.policy.parameters()), 0
        make_moments(self.optimizer)
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                local(state[name]).uniform_()


def saves(parameters: int, rounds: int, folder: Path) -> Iterator[dict]:
    """Of this rank; the figures are rank 0's."""
    with process_group(600) as (ranks, mesh, device):
        state = State(parameters, mesh, device)
        kept = {
            way: Checkpoints(folder / way, ranks, CheckpointConfig(keep=1, asynchronous=asynchronous), print)
            for way, asynchronous in WAYS.items()
        }
        for number in range(rounds + 1):
            for way, checkpoints in kept.items():
                checkpoints.save(state, RunState(step=number + 1))
                checkpoints.finish()
                measured = checkpoints.measured()
                stall, write = measured["time/checkpoint"], measured["time/checkpoint_write"]
                yield {"way": way, "number": number, "stall": stall, "write": write, "bytes": measured.get("checkpoint/bytes")}


def run_rank(rank: int, size: int, port: int, parameters: int, rounds: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    found = list(saves(parameters, rounds, folder))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def measure(size: int, parameters: int, rounds: int, folder: Path) -> list[dict]:
    """A row a way: medians over the rounds after the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="keju-checkpoint-", dir=folder) as place:
        mp.spawn(run_rank, (size, port, parameters, rounds, Path(place)), nprocs=size)
        found = json.loads((Path(place) / "found.json").read_text(encoding="utf-8"))
    rows = []
    for way in WAYS:
        first, *rest = [each for each in found if each["way"] == way]
        median = {name: statistics.median(each[name] for each in rest) for name in ("stall", "write")}
        rows.append({"ranks": size, "way": way, "bytes": first["bytes"], "first_stall": first["stall"]} | median)
    return rows


def table(rows: list[dict]) -> Table:
    shown = Table("ranks", "way", "GB", "stall of the first, s", "stall, s", "write, s", "write, GB/s")
    for row in rows:
        size = row["bytes"] / 1e9
        seconds = (f"{row[name]:.2f}" for name in ("first_stall", "stall", "write"))
        shown.add_row(str(row["ranks"]), row["way"], f"{size:.2f}", *seconds, f"{size / row['write']:.2f}")
    return shown


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.checkpoint", description="How long a save holds a run up.")
    parser.add_argument("--parameters", type=float, default=5e8, help="default 5e8, which take 6 GB, and as much for the copy")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes; default 1 2")
    parser.add_argument("--rounds", type=int, default=3, help="saves each way after the first; default 3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    parameters = int(options.parameters)
    needed = 4 * 12 * parameters  # of each way the one that stands and the one being written
    if free_bytes(options.folder) < needed:
        raise InputError(f"--folder {options.folder}: needs {needed / 1e9:.3g} GB free; name another, or lower --parameters")
    rows = [row for size in options.ranks for row in measure(size, parameters, options.rounds, options.folder)]
    Console().print(table(rows))
    if options.out is not None:
        file_system = {"free": free_bytes(options.folder), "total": shutil.disk_usage(options.folder).total}
        record = {"parameters": parameters, "rounds": options.rounds, "rows": rows, "disk": file_system, "machine": provenance()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)
