"""From a run's figures to its record (JSON), and from the record to the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.timing import spread
from benchmarks.train_step.bench import Bench, Figures
from benchmarks.train_step.operations import StepFlops, utilisation
from benchmarks.train_step.phases import HEAD, PHASES
from benchmarks.train_step.setting import SWITCHES
from trainer.config import RunConfig
from trainer.layers import LayerOptions
from trainer.planner.architecture import Sizes
from trainer.planner.cost import Ceilings, Work, computed_again, forward_flops, head_flops, step_cost

FORMULAS = {
    "seconds": "median, 10 % and 90 % quantiles over rounds in which all ways ran in turn, without marks; step = score + update",
    "phases": "means over rounds of their own, with marks that end each phase; they sum to that round's score and update",
    "mfu": "3 · (forward + head) FLOPs over the update's median seconds · ranks · the median GEMM rate: nothing counted twice",
    "mfu_step": "4 · (forward + head) FLOPs, score included, over the step's median seconds · ranks · the median GEMM rate",
    "hfu": "FLOPs that the update did, what checkpointing computes again included, over the same",
    "gemm": "operations a second of one layer's matrix products, forward, in the dtype that computes, after each step",
    "head_share": "seconds of the loss head, forward and gradient, in score and update, over both, in rounds with marks",
    "memory": "measured: of the update, a GPU's most allocated bytes, or how far a CPU process's resident set rose; planned: "
    "trainer.planner.trace of the same configuration, tensors alone; ratio: planned over measured",
    "planned_seconds": "trainer.planner.cost at the measured GEMM rate and its own assumed utilisation; optimizer not counted",
    "relative": "medians over the first way's",
}


def cost_of(config: RunConfig, sizes: Sizes, model: Any, ranks: int, rate: float) -> tuple[StepFlops, dict[str, float]]:
    """(FLOPs without what is computed again, the planner's seconds). model: the transformers configuration."""
    stage = config.stages[0]
    outputs = stage.batch.group_size
    flops = StepFlops(forward_flops(sizes, stage.context, outputs), head_flops(sizes, outputs * stage.response_limit))
    itemsize = getattr(torch, config.model.precision).itemsize
    cost = step_cost(config, 0, sizes, model.to_dict(), ranks, 0, Ceilings(flops=rate), Work(1.0, 1.0), itemsize)
    return flops, {name: cost.seconds[name] for name in ("score", "update")}


def way_record(
    config: RunConfig, layers: LayerOptions, model: Any, sizes: Sizes, figures: Figures, ranks: int, rate: float,
    memory: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """layers: how they ran. model: the transformers configuration. memory: planned (by phase) and measured, either None."""
    stage = config.stages[0]
    itemsize = getattr(torch, config.model.precision).itemsize
    flops, planned = cost_of(config, sizes, model, ranks, rate)
    again = computed_again(sizes, model, layers, itemsize, stage.context, stage.batch.group_size)
    flops = StepFlops(flops.forward, flops.head, again)
    step = [score + update for score, update in zip(figures.score, figures.update, strict=True)]
    seconds = {"score": figures.score, "update": figures.update, "step": step}
    middle = {name: median(values) for name, values in seconds.items()}
    phases = {"score": means(figures.score_phases), "update": means(figures.update_phases)}
    return {
        "model": {name: getattr(config.model, name) for name in SWITCHES},
        "seconds": {name: asdict(spread(values)) for name, values in seconds.items()},
        "phases": phases,
        "tokens_per_second": stage.context * stage.batch.group_size / middle["step"],
        "flops": {"forward": flops.forward, "head": flops.head, "computed_again": again},
        "mfu": utilisation(flops.model_update, middle["update"], ranks, rate),
        "mfu_step": utilisation(flops.model_step, middle["step"], ranks, rate),
        "hfu": utilisation(flops.done_update, middle["update"], ranks, rate),
        "head_share": head_share(phases),
        "planned_seconds": planned,
        "seconds_over_planned": {name: middle[name] / planned[name] for name in planned},
        "memory": memory_record(memory),
        "grad_norm": figures.grad_norm,
    }


def memory_record(memory: Mapping[str, Any]) -> dict[str, Any]:
    update = (memory.get("planned") or {}).get("update")
    measured = memory.get("measured")
    return {
        "measured": measured,
        "reserved": memory.get("reserved"),
        "planned": update and update["total"],
        "planned_kinds": update and update["kinds"],
        "ratio": update["total"] / measured if update and measured else None,
        "missing": memory.get("missing"),
    }


def means(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means, not medians: they still sum to the whole."""
    return {phase: sum(each[phase] for each in rounds) / len(rounds) for phase in PHASES}


def head_share(phases: Mapping[str, Mapping[str, float]]) -> float:
    return sum(each[HEAD] for each in phases.values()) / sum(sum(each.values()) for each in phases.values())


def gate_metrics(way: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: way[name] for name in ("mfu", "hfu", "head_share")} | {"memory_ratio": way["memory"]["ratio"]}


def add_relative(ways: Mapping[str, dict[str, Any]]) -> None:
    """Each one's seconds and memory over the first one's."""
    first = next(iter(ways.values()))
    for way in ways.values():
        memory, base = way["memory"]["measured"], first["memory"]["measured"]
        way["relative"] = {
            "update": way["seconds"]["update"]["median"] / first["seconds"]["update"]["median"],
            "step": way["seconds"]["step"]["median"] / first["seconds"]["step"]["median"],
            "memory": memory / base if memory and base else None,
        }


def ways_record(
    bench: Bench, configs: Mapping[str, RunConfig], sizes: Sizes, figures: Mapping[str, Figures],
    ranks: int, rate: float, memory: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    ways = {}
    for name, config in configs.items():
        found = dict(memory[name])
        if bench.device.type == "cuda":
            found |= {"measured": figures[name].allocated, "reserved": figures[name].reserved}
        layers, transformers_config = bench.options[name].layers, bench.policy.causal_lm.config
        ways[name] = way_record(config, layers, transformers_config, sizes, figures[name], ranks, rate, found)
    add_relative(ways)
    return ways


def show(record: Mapping[str, Any], console: Console) -> None:
    setting, machine = record["setting"], record["machine"]
    console.print(
        f"[bold]{setting['architecture']}[/bold], {setting['parameters'] / 1e6:,.0f} million parameters: {setting['sequences']} "
        f"sequences of {setting['context']:,} tokens, {setting['micro_batch']:,} a micro-batch; computes in {setting['dtype']}, "
        f"weights {setting['weights']}, gradients {setting['gradients']}, {setting['optimizer']}; attention "
        f"{setting['attention']}, loss {setting['loss']}\n"
        f"{machine['device']}, ranks: {setting['ranks']}; GEMM {record['gemm']['median'] / 1e12:.3g} TFLOP/s "
        f"({record['gemm']['p10'] / 1e12:.3g}–{record['gemm']['p90'] / 1e12:.3g}); load {machine['load']['before']:.1f} before, "
        f"{machine['load']['after']:.1f} after",
        highlight=False,
    )
    console.print(summary_table(record["ways"]), phase_table(record["ways"]))
    for name, way in record["ways"].items():
        if way["memory"]["missing"]:
            console.print(f"{name}: memory: {way['memory']['missing']}", highlight=False, markup=False)


def summary_table(ways: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        "", "step s", "p10–p90", "tokens/s", "× first", "MFU", "HFU", "head", "score s : planned", "update s : planned",
        "memory GB", "planned", "ratio", "× first",
    )  # fmt: skip
    for name, way in ways.items():
        step, memory = way["seconds"]["step"], way["memory"]
        planned = [
            f"{way['seconds'][phase]['median']:.3g} : {way['planned_seconds'][phase]:.3g} = {ratio:.2f}"
            for phase, ratio in way["seconds_over_planned"].items()
        ]
        table.add_row(
            name, f"{step['median']:.3g}", f"{step['p10']:.3g}–{step['p90']:.3g}", f"{way['tokens_per_second']:,.0f}",
            f"{way['relative']['step']:.2f}", f"{way['mfu']:.0%}", f"{way['hfu']:.0%}", f"{way['head_share']:.1%}", *planned,
            gb(memory["measured"]), gb(memory["planned"]), number(memory["ratio"]), number(way["relative"]["memory"]),
        )  # fmt: skip
    return table


def phase_table(ways: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("seconds, with marks", "of", *PHASES, "sum")
    for name, way in ways.items():
        for of, phases in way["phases"].items():
            values = [phases[phase] for phase in PHASES]
            table.add_row(name, of, *(f"{value:.3g}" if value else "–" for value in values), f"{sum(values):.3g}")
    return table


def gb(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
