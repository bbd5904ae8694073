"""`python -m benchmarks.loading [ARCHITECTURE] [--ranks N]`: what each rank reads and takes when a policy is loaded into shards.

A folder of random bf16 weights of a named architecture is written, and loaded by so many processes of this machine over gloo
(`trainer.policy.build_policy`): fp32 master weights, each rank its own rows. Per rank

    read    bytes that it took out of the safetensors file / bytes of its rows there
    peak    rise of its resident set (VmHWM), what it maps of the file included / bytes of its shards in fp32
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.kernels.memory import resident_bytes
from rollout.cli import Parser
from rollout.environment import provenance
from trainer import cli, loading
from trainer.planner.architecture import model_folder
from trainer.policy import PolicyOptions, build_policy

MAX_READ, MAX_PEAK = 1.1, 1.3


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.loading", description="What loading a policy into shards reads and holds.")
    parser.add_argument("architecture", nargs="?", default="qwen2.5-1.5b", help="of trainer.planner.architecture (qwen2.5-1.5b)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gate", action="store_true", help=f"exit 1 above {MAX_READ} × read or {MAX_PEAK} × peak")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="keju-loading-") as scratch:
        folder = Path(scratch) / "model"
        stored = write_random(options.architecture, folder)
        rows = on_ranks(folder, options.ranks, Path(scratch))
    Console().print(table(options.architecture, stored, rows))
    if options.out is not None:
        record = {"architecture": options.architecture, "stored_bytes": stored, "ranks": rows, "machine": provenance()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = [f"rank {row['rank']}: {fault}" for row in rows for fault in faults(row)]
    if options.gate and failed:
        print("gate: " + "; ".join(failed))
        return 1
    return 0


def write_random(architecture: str, folder: Path) -> int:
    """A folder of random bf16 weights in one file; its bytes."""
    folder.mkdir()
    with model_folder(folder, architecture) as (_, config):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    causal_lm = loading.empty_causal_lm(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, parameter in causal_lm.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return (folder / "model.safetensors").stat().st_size


def on_ranks(folder: Path, ranks: int, scratch: Path) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results = [scratch / f"rank-{rank}.json" for rank in range(ranks)]
    processes = [
        context.Process(target=load, args=(rank, ranks, folder, scratch / "meet", results[rank])) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"exit codes of the ranks: {[process.exitcode for process in processes]}")
    return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def load(rank: int, ranks: int, folder: Path, meet: Path, result: Path) -> None:
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    read = count_reads()
    loading.empty_causal_lm(folder)  # what is imported is not the model's memory
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    policy = build_policy(folder, mesh, PolicyOptions(torch.float32))
    seconds = time.perf_counter() - started
    peak = resident_bytes("VmHWM") - before
    shards = sum(parameter.to_local().nbytes for parameter in policy.parameters())
    share = shards // 2  # stored as bf16
    row = {"rank": rank, "read": sum(read), "share": share, "peak": peak, "shards": shards, "seconds": seconds}
    result.write_text(json.dumps(row), encoding="utf-8")
    dist.destroy_process_group()


def count_reads() -> list[int]:
    """A list to which every slice that loading takes out of a file adds its bytes."""
    read: list[int] = []
    fill = loading._fill

    class Counted:
        def __init__(self, stored: Any) -> None:
            self._stored = stored

        def __getitem__(self, rows: Any) -> torch.Tensor:
            piece = self._stored[rows]
            read.append(piece.nbytes)
            return piece

    loading._fill = lambda parameter, stored: fill(parameter, Counted(stored))
    return read


def faults(row: dict[str, Any]) -> list[str]:
    """What of a rank is above its bound."""
    found = []
    if row["read"] > MAX_READ * row["share"]:
        found.append(f"read {row['read'] / row['share']:.2f} × its share, at most {MAX_READ}")
    if row["peak"] > MAX_PEAK * row["shards"]:
        found.append(f"held {row['peak'] / row['shards']:.2f} × its shards, at most {MAX_PEAK}")
    return found


def table(architecture: str, stored: int, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{architecture}, {stored / 1e9:.2f} GB of bf16 on {len(rows)} ranks")
    for column in ("rank", "read", "/ share", "peak memory", "/ fp32 shards", "seconds"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            str(row["rank"]),
            f"{row['read'] / 1e9:.3f} GB",
            f"{row['read'] / row['share']:.3f}",
            f"{row['peak'] / 1e9:.3f} GB",
            f"{row['peak'] / row['shards']:.3f}",
            f"{row['seconds']:.1f}",
        )
    return shown


if __name__ == "__main__":
    cli.run(main)
