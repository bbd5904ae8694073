"""A plan for a person, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from trainer.planner.cost import paper_hours
from trainer.planner.plan import Plan, gb
from trainer.planner.trace import PHASES

MEASURED = ("weights", "optimizer", "gradients", "gathered units", "reduction buffers", "activations")
COLUMNS = (*MEASURED, "loss head", "allocator", "push buffers", "engine", "context")


def show(plan: Plan, console: Console) -> None:
    """The whole of it."""
    console.print(Group(_head(plan), memory_table(plan), time_table(plan), cost_table(plan)))


def memory_table(plan: Plan) -> Table:
    """GB on one rank at each phase's peak."""
    limit = plan.question.machine.memory
    table = Table(title=f"Memory of a rank at its peak, GB (of {gb(limit)})", title_justify="left")
    table.add_column("stage")
    table.add_column("phase")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("peak", justify="right", style="bold")
    for row in plan.memory:
        numbers = [f"{row.parts[name] / 1e9:.1f}" if row.parts[name] else "–" for name in COLUMNS]
        peak = f"{row.total / 1e9:.1f}"
        first = row.phase == PHASES[0]
        label = str(row.stage + 1) if first else ""
        table.add_row(label, row.phase, *numbers, peak if row.total <= limit else f"[red]{peak} > {limit / 1e9:.1f}[/red]")
        if row.phase == PHASES[-1]:
            table.add_section()
    return table


def time_table(plan: Plan) -> Table:
    """Estimates of a step."""
    question = plan.question
    table = Table(title="ESTIMATE of a step (formulas and ceilings: docs/planning.md)", title_justify="left")
    table.add_column("stage")
    for name in ("rollout", "score", "update", "sync", "checkpoint", "step"):
        table.add_column(f"{name} s", justify="right")
    for name in ("outputs at once", "sampled tok/s", "trained tok/s", "update PFLOP", "update MFU"):
        table.add_column(name, justify="right")
    gpus, ceiling = question.machine.gpus, question.ceilings.flops
    for cost in plan.costs:
        seconds = cost.seconds
        mfu = cost.model_flops / seconds["update"] / gpus / ceiling
        table.add_row(
            question.config.stages[cost.stage].name,
            *(f"{seconds[name]:.0f}" if seconds[name] >= 10 else f"{seconds[name]:.1f}"
              for name in ("rollout", "score", "update", "sync", "checkpoint")),
            f"{cost.total_seconds:.0f}",
            str(cost.sequences_at_once),
            f"{cost.sampled_tokens / seconds['rollout']:.0f}",
            f"{cost.tokens / (seconds['score'] + seconds['update']):.0f}",
            f"{cost.model_flops / 1e15:.0f}",
            f"{mfu:.0%}",
        )  # fmt: skip
    return table


def cost_table(plan: Plan) -> Table:
    """GPU-hours of the run, beside the paper's where it is the paper's run."""
    paper = paper_hours(plan.question.config.stages)
    table = Table(title="ESTIMATE of the run", title_justify="left")
    for name in ("stage", "steps", "GPU-hours", "cost $"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    if paper:
        table.add_column("paper, GPU-hours", justify="right")
    rows = hours(plan)
    price = plan.question.price
    for index, (stage, spent) in enumerate(zip(plan.question.config.stages, rows, strict=True)):
        table.add_row(
            stage.name, str(stage.steps), f"{spent:.0f}", f"{spent * price:.0f}", *([f"{paper[index]}"] if paper else [])
        )
    total = sum(rows)
    table.add_section()
    table.add_row(
        "in all",
        str(plan.question.config.total_steps),
        f"{total:.0f}",
        f"{total * price:.0f}",
        *([f"{sum(paper)}"] if paper else []),
    )
    return table


def hours(plan: Plan) -> list[float]:
    """GPU-hours, by stage."""
    gpus = plan.question.machine.gpus
    return [plan.question.config.stages[cost.stage].steps * cost.total_seconds * gpus / 3600 for cost in plan.costs]


def as_json(plan: Plan, mend: Plan | None) -> dict[str, Any]:
    """Everything the tables show, in bytes, seconds and operations. mend: a plan that fits, where this one does not."""
    question = plan.question
    return {
        "fits": plan.fault is None,
        "fault": plan.fault,
        "mend": list(mend.question.changes) if mend is not None else None,
        "machine": asdict(question.machine),
        "model": asdict(plan.sizes),
        "assumed": {"overhead": question.overhead, "price": question.price} | asdict(question.ceilings) | asdict(question.work),
        "engine": asdict(plan.engine),
        "memory": [asdict(row) | {"total": row.total} for row in plan.memory],
        "cost": [asdict(cost) | {"total_seconds": cost.total_seconds} for cost in plan.costs],
        "gpu_hours": hours(plan),
        "paper_gpu_hours": paper_hours(question.config.stages),
    }


def _head(plan: Plan) -> str:
    question = plan.question
    return (
        f"{plan.sizes.parameters / 1e9:.2f} B parameters on {question.machine.gpus} GPUs of {gb(question.machine.memory)}. The "
        "trainer's tensors are traced from its own code; engine, context and allocator are assumed. Not yet compared with a GPU."
    )
