"""`python -m benchmarks.train_step ARCHITECTURE --context N`: score and update of a named model with random weights, measured.

    python -m benchmarks.train_step smollm2-135m --context 1024 --compare checkpointing selective compile
    python -m benchmarks.train_step qwen2.5-14b --context 16384 --weights bfloat16 --optimizer adamw8bit --checkpointing --gate
    torchrun --nproc-per-node 8 -m benchmarks.train_step qwen2.5-14b --context 16384 --checkpointing

It is the trainer that runs: `trainer.policy`, `trainer.actor`, `trainer.optimizer`, under a run's configuration, on one rank a
process. Seconds come from rounds that nothing disturbs, phases from rounds of their own with marks, the ceiling from matrix
products in between (`benchmarks.train_step.operations` has the formulas), and beside them stands what `trainer.planner` says of
the same configuration. --compare: other ways to keep activations take turns with the one that the options name.

--gate: exit code 1 where a line of benchmarks/gates.toml for this measurement does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.report import device_name
from benchmarks.kernels.timing import spread
from benchmarks.train_step import apart, gates, report
from benchmarks.train_step.bench import Bench
from benchmarks.train_step.setting import WAYS, run_config, ways
from kernels.backend import loss_path
from rollout.cli import Parser, run
from rollout.environment import provenance, version_of
from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer.config import RunConfig
from trainer.distributed import process_group
from trainer.planner.architecture import NAMED, Sizes, model_folder
from trainer.planner.fit import CONTEXT, OVERHEAD
from trainer.policy import PolicyWeights

GATES = Path(__file__).parents[1] / "gates.toml"
TIMEOUT = 1800


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = options.dtype or ("bfloat16" if device_type == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    lines = []
    if options.gate:
        lines = gates.chosen(gates.read(options.gates), device_class(), options.architecture, options.context, options.dtype)
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out: {options.out.parent} is no folder; make it first")
    load = os.getloadavg()[0]
    with model_folder(Path(), options.architecture) as (folder, model):
        configs = ways(run_config(options, folder, model), [WAY_NAMES[name] for name in options.compare], model)
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        console = Console() if Console().is_terminal else Console(width=200)
        note = (lambda text: print(f"train_step: {text}", flush=True)) if rank == 0 else (lambda _: None)
        memory = {name: memory_of(config, size, device_type, note) for name, config in configs.items() if rank == 0}
        with process_group(TIMEOUT) as (ranks, mesh, device):
            bench = Bench(configs, ranks, mesh, device)
            figures, rates = bench.measure(options.rounds, options.marked_rounds, note)
            if rank:
                return 0
            sizes = Sizes.of(model, PolicyWeights(bench.policy).metadata())
            rate = spread(rates)
            found = report.ways_record(bench, configs, sizes, figures, ranks.size, rate.median, memory)
            record = {
                "command": " ".join(["python -m benchmarks.train_step", *arguments]),
                "setting": setting_record(bench, options, sizes, ranks),
                "gemm": {name: getattr(rate, name) for name in ("median", "p10", "p90", "rounds")},
                "ways": found,
                "gates": [],
                "formulas": report.FORMULAS,
                "machine": machine_record(device, load),
            }
    judged = [gates.judge(line, report.gate_metrics(next(iter(found.values())))) for line in lines]
    record["gates"] = [{"name": one.line.name, "held": one.held, "text": one.text} for one in judged]
    report.show(record, console)
    for one in judged:
        print(f"{'held  ' if one.held else 'BROKEN'} {one.line.name}: {one.text}")
    if options.out is not None:
        write(options.out, record, note)
    return int(any(not one.held for one in judged))


WAY_NAMES = {name.replace(", ", "-").replace(" ", "-"): name for name in WAYS}
"""As the command line spells them."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.train_step", description="A full update of a named model, measured.")
    add = parser.add_argument
    add("architecture", choices=NAMED, metavar="ARCHITECTURE", help=f"one of {', '.join(NAMED)}")
    add("--context", type=whole, required=True, metavar="N", help="tokens of each sequence, prompt included")
    add("--sequences", type=whole, default=2, help="of the mini-batch, on all ranks together (default 2, the least)")
    add("--micro-batch", type=whole, metavar="TOKENS", help="actor.tokens_per_micro_batch (default: --context)")
    add("--dtype", choices=("float32", "bfloat16"), help="that computes (default: bfloat16 on a GPU, else float32)")
    add("--weights", choices=("float32", "bfloat16"), default="float32", help="model.weights")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="optimizer.kind")
    add("--offload-optimizer", action="store_true", help="optimizer.offload")
    add("--gradients", choices=("float32", "bfloat16"), default="float32", help="optimizer.gradients")
    add("--checkpointing", action="store_true", help="model.gradient_checkpointing")
    add("--saved-gib", type=float, default=0.0, metavar="X", help="model.saved_gib")
    add("--offload-activations", action="store_true", help="model.offload_activations")
    add("--compile", action="store_true", help="model.compile")
    add("--attention", choices=("auto", "flash", "varlen", "sdpa"), default="auto", help="model.attention")
    add("--compare", nargs="+", choices=WAY_NAMES, default=[], metavar="WAY", help=f"also, in turn: {', '.join(WAY_NAMES)}")
    add("--rounds", type=whole, default=5, help="without marks, after one that warms up")
    add("--marked-rounds", type=whole, default=1, help="with marks, from which the phases come")
    add("--threads", type=whole, help="on a CPU (default: torch's)")
    add("--seed", type=int, default=0)
    add("--gate", action="store_true", help="exit code 1 where a line of gates.toml is broken")
    add("--gates", type=Path, default=GATES, metavar="FILE")
    add("--out", type=Path, metavar="FILE.json", help="write the record, and FILE.png beside it")
    options = parser.parse_args(arguments)
    if options.sequences < 2:
        raise InputError(f"command line: --sequences: {options.sequences} is less than the 2 outputs of a group; raise it")
    return options


def whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def memory_of(config: RunConfig, ranks: int, device_type: str, note: Any) -> dict[str, Any]:
    """Planned memory, and on a CPU measured memory. What could not be had is missing, with its reason: a measurement goes on
    without."""
    found: dict[str, Any] = {"planned": None, "measured": None, "missing": None}
    try:
        note("planning its memory")
        found["planned"] = apart.planned(config, ranks, device_type)
        need = found["planned"]["update"]["total"] * (1 + OVERHEAD) + CONTEXT
        if device_type == "cuda" and need > (there := torch.cuda.mem_get_info()[1]):
            note(f"planned are {need / 1e9:.1f} GB, and the GPU has {there / 1e9:.1f}: trying")
        if device_type == "cpu" and ranks == 1:
            note("measuring the memory of a process")
            found["measured"] = apart.resident(config, torch.get_num_threads())
    except InputError as error:
        found["missing"] = str(error)
        note(f"memory: {error}")
    return found


def device_class() -> str | None:
    """As gates.toml names it."""
    if not torch.cuda.is_available():
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability()[0] == 9 else None


def setting_record(bench: Bench, options: argparse.Namespace, sizes: Sizes, ranks: Ranks) -> dict[str, Any]:
    config, stage = bench.config, bench.stage
    return {
        "architecture": options.architecture,
        "parameters": sizes.parameters,
        "context": stage.context,
        "prompt_tokens": stage.data.max_prompt_tokens,
        "sequences": stage.batch.group_size,
        "micro_batch": stage.actor.tokens_per_micro_batch,
        "dtype": config.model.precision,
        "weights": config.model.weights,
        "gradients": config.optimizer.gradients,
        "optimizer": config.optimizer.kind + (", offloaded" if config.optimizer.offload else ""),
        "attention": bench.policy.attention.kernel,
        "loss": loss_path(bench.device.type),
        "ranks": ranks.size,
        "rounds": options.rounds,
        "marked_rounds": options.marked_rounds,
        "seed": config.seed,
    }


def machine_record(device: torch.device, load: float) -> dict[str, Any]:
    found = {
        **provenance(),
        "commit": os.environ.get("COMMIT") or provenance()["commit"],
        "triton": version_of("triton"),
        "device": device_name(device),
        "load": {"before": load, "after": os.getloadavg()[0]},
    }
    if device.type == "cuda":
        found["memory"] = torch.cuda.get_device_properties(device).total_memory
    return found


def write(path: Path, record: dict[str, Any], note: Any) -> None:
    """Beside and renamed: never half of it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
    try:
        from benchmarks.train_step.plot import draw
    except ImportError as error:
        note(f"no picture: {error}")
        return
    note(f"wrote {path} and {draw(path)}")


if __name__ == "__main__":
    run(main)
