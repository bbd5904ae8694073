"""A configuration planned for so many GPUs of so much memory, and a configuration that fits where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rollout.errors import InputError
from trainer.config import RunConfig
from trainer.planner.architecture import Sizes
from trainer.planner.cost import Ceilings, StepCost, Work, step_cost, stop_wait
from trainer.planner.fit import CONTEXT, OVERHEAD, Engine, PhaseMemory, engine_share, phases, push_buffers
from trainer.planner.trace import Traced, trace

SERVER_GPUS = 8
"""Most GPUs that one vLLM is spread over in a mend."""
MOST_GPUS = 64
"""Most that a mend asks for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """gpus: ranks. memory: bytes of each."""

    gpus: int
    memory: int


@dataclass(frozen=True, slots=True)
class Question:
    """What is planned. folder: holds config.json, whose content is `model`. stages: indices."""

    config: RunConfig
    machine: Machine
    folder: Path
    model: dict[str, Any]
    stages: tuple[int, ...]
    overhead: float = OVERHEAD
    ceilings: Ceilings = field(default_factory=Ceilings)
    work: Work = field(default_factory=Work)
    price: float = 2.0
    """Dollars a GPU-hour, the paper's."""
    changes: tuple[str, ...] = ()
    """How it differs from the configuration that was given, as a user would write it."""

    @property
    def precision(self) -> torch.dtype:
        """In which a GPU computes."""
        return torch.float32 if self.config.model.precision == "float32" else torch.bfloat16

    def changed(self, text: str, *, gpus: int | None = None, tokens: int | None = None, **sections: dict[str, Any]) -> Question:
        """The same with other values of keys in sections of its configuration, other tokens_per_micro_batch, or on more GPUs."""
        config = self.config
        update: dict[str, Any] = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
        if tokens is not None:
            update["stages"] = tuple(
                stage.model_copy(update={"actor": stage.actor.model_copy(update={"tokens_per_micro_batch": tokens})})
                for stage in config.stages
            )
        machine = self.machine if gpus is None else replace(self.machine, gpus=gpus)
        changes = (*self.changes, text)
        return replace(self, config=config.model_copy(update=update), machine=machine, changes=changes)


@dataclass(frozen=True, slots=True)
class Plan:
    question: Question
    sizes: Sizes
    engine: Engine
    memory: list[PhaseMemory]
    costs: list[StepCost]

    @property
    def worst(self) -> PhaseMemory:
        return max(self.memory, key=lambda row: row.total)

    @property
    def trains(self) -> bool:
        """Whether what has nothing to do with the engine's size fits: the phases in which it sleeps, and the trainer alone."""
        limit = self.question.machine.memory
        return all(row.total - (row.parts["engine"] - self.engine.asleep) <= limit for row in self.memory)

    @property
    def fault(self) -> str | None:
        """One line on why it does not fit; None where it does."""
        config, memory, worst = self.question.config, self.question.machine.memory, self.worst
        if worst.total > memory:
            stage = config.stages[worst.stage]
            return f"{worst.phase} of stage {stage.name!r} needs {gb(worst.total)} on a rank, and a GPU has {gb(memory)}"
        if config.engine.kind == "vllm" and self.engine.cache_tokens < config.max_tokens:
            return (
                f"rollout: vLLM's share of a GPU leaves a cache of {self.engine.cache_tokens} tokens, and one sequence may have "
                f"{config.max_tokens}"
            )
        return None

    @property
    def late_stop(self) -> str | None:
        """One line where a clean stop may take longer than it is given; None where it does not."""
        config = self.question.config
        seconds, cost = max(((stop_wait(cost, config), cost) for cost in self.costs), key=lambda pair: pair[0])
        if seconds <= config.checkpoint.stop_seconds:
            return None
        return (
            f"checkpoint.stop_seconds: {config.checkpoint.stop_seconds:g} is less than a stop may take in stage "
            f"{config.stages[cost.stage].name!r}: score, update, sync and a checkpoint are planned with {seconds:.0f} s; set it "
            "higher, or such a stop ends with exit code 3 and no checkpoint"
        )


def make_plan(question: Question, traced: Traced | None = None) -> Plan:
    """Raises InputError where the GPUs cannot be divided as the configuration asks."""
    config, machine = question.config, question.machine
    if machine.gpus % config.engine.tensor_parallel:
        raise InputError(
            f"engine.tensor_parallel: {config.engine.tensor_parallel} does not divide the {machine.gpus} GPUs; set a divisor"
        )
    traced = traced or traced_of(question)
    sizes = Sizes.of(question.model, traced.metadata)
    itemsize = question.precision.itemsize
    engine = engine_share(config, sizes, machine.memory, itemsize)
    buffers = push_buffers(config, traced.metadata, question.precision)
    memory = [row for index, stage in traced.stages.items() for row in phases(index, stage, engine, buffers, question.overhead)]
    costs = [
        step_cost(
            config, index, sizes, question.model, machine.gpus, engine.cache_tokens, question.ceilings, question.work, itemsize
        )
        for index in range(len(config.stages))
    ]
    return Plan(question, sizes, engine, memory, costs)


def traced_of(question: Question) -> Traced:
    return trace(question.config, question.folder, question.machine.gpus, question.precision, stages=question.stages)


def mended(plan: Plan, note: Callable[[str], None] = lambda _: None) -> Plan | None:
    """A plan that fits, by as few changes as were tried, each of them kept; None where none was found. note: told of each try."""
    question, traced = plan.question, None
    if not plan.trains:
        for question in _training_mends(plan.question):
            note(question.changes[-1])
            traced = traced_of(question)
            plan = make_plan(question, traced)
            if plan.trains:
                break
        else:
            return None
    if plan.fault is None:
        return plan
    traced = traced or traced_of(question)
    for candidate in _engine_mends(plan):
        note(candidate.changes[-1])
        found = make_plan(candidate, traced)
        if found.fault is None:
            return found
    return None


def _training_mends(question: Question) -> Iterator[Question]:
    """Each with what those before it changed, cheapest first."""
    config = question.config
    if not config.model.gradient_checkpointing:
        question = question.changed("model.gradient_checkpointing=true", model={"gradient_checkpointing": True})
        yield question
    longest = max(stage.context for stage in config.stages)
    if max(stage.actor.tokens_per_micro_batch for stage in config.stages) > longest:
        question = question.changed(f"actor.tokens_per_micro_batch={longest}", tokens=longest)
        yield question
    if (shards := config.parallel.shard_ranks) is not None and shards < question.machine.gpus:
        question = question.changed("parallel.shard_ranks=null", parallel={"shard_ranks": None})
        yield question
    if config.optimizer.kind == "adamw" and not config.optimizer.offload:
        question = question.changed("optimizer.offload=true", optimizer={"offload": True})
        yield question
    if config.model.weights == "bfloat16" and config.optimizer.gradients == "float32":
        question = question.changed("optimizer.gradients=bfloat16", optimizer={"gradients": "bfloat16"})
        yield question
    while (gpus := question.machine.gpus * 2) <= MOST_GPUS:
        question = question.changed(f"{gpus} GPUs in place of {question.machine.gpus}", gpus=gpus)
        yield question


def _engine_mends(plan: Plan) -> Iterator[Question]:
    """Of a plan that trains: a smaller share for vLLM, and where its cache is then too small, one vLLM over several GPUs."""
    question, memory = plan.question, plan.question.machine.memory
    if question.config.engine.kind != "vllm":
        return
    if question.config.engine.kv_cache_gib is not None:
        question = question.changed("engine.kv_cache_gib=null", engine={"kv_cache_gib": None})
    others = max(row.total - row.parts["engine"] for row in plan.memory if row.phase not in ("score", "update"))
    share = int((memory - others - CONTEXT) / memory * 100) / 100
    if share < 0.05:
        return
    fraction = min(share, question.config.engine.gpu_memory_fraction)
    smaller = question.changed(f"engine.gpu_memory_fraction={fraction:g}", engine={"gpu_memory_fraction": fraction})
    heads = question.model["num_attention_heads"]
    yield smaller
    together = question.config.engine.tensor_parallel
    while (together := together * 2) <= min(SERVER_GPUS, question.machine.gpus):
        if heads % together == 0 and question.machine.gpus % together == 0:
            yield smaller.changed(f"engine.tensor_parallel={together}", engine={"tensor_parallel": together})


def gb(count: float) -> str:
    """Bytes as GB, 10^9."""
    return f"{count / 1e9:.1f} GB"
