"""What a run takes: floating-point operations by formula, seconds from stated ceilings, GPU-hours and their price. Estimates.

    forward of n tokens     2 · B · n  +  4 · L · A · n² / 2        B: weights of the layers, L: layers, A: heads · head dimension
    head of r of them       2 · V · D · r                           one GEMM; the policy loss takes three, its forward included
    score                   forward + head
    update, counted by MFU  3 · (forward + head)                    so 6 · P · tokens and the attention, without recomputation
    update, done            3 · (forward + head) and what checkpointed layers compute again (`computed_again`)
    seconds                 operations done / (GPUs · --tflops · --utilisation)

    rollout                 outputs / b times as many decoding steps as a response has tokens, b sequences at once on an engine;
                            a step reads the weights and b caches: bytes / (--bandwidth · READ_SHARE), or it does 2 · P · b
                            operations where those take longer
    sync, checkpoint        weights gathered over --link; weights and moments over --disk, every checkpoint.every steps

All responses are taken as equally long. Not counted: the wait for the longest, verification, evaluation, start, faults.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from trainer.config import RunConfig, StageConfig
from trainer.layers import LayerOptions, kept_bytes, layer_options, plan_kept
from trainer.planner.architecture import Sizes

PAPER_GPU_HOURS = (4234, 5470, 3405)
"""Confucius3-Math, arXiv 2506.18330, table 4: stages 1 to 3 on 8 H800."""
PROMPT_TOKENS = 115
"""The paper's average input in serving; it gives none for training."""
READ_SHARE = 0.6
"""Assumed: share of the memory's bandwidth that decoding reaches."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Per GPU. The defaults are an H800 SXM: NVIDIA's data sheet of the H100 SXM, of which the H800 differs by NVLink (400 GB/s,
    200 in each direction) and fp64."""

    flops: float = 989e12
    """bf16, dense."""
    bandwidth: float = 3.35e12
    """Bytes/s of memory."""
    link: float = 200e9
    """Bytes/s to the other GPUs of its server."""
    disk: float = 5e9
    """Assumed: bytes/s of all ranks together."""
    utilisation: float = 0.45
    """Assumed: share of `flops` that score and update reach, in operations done."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the configuration does not say. Assumed. response_share: mean response length, of the stage's limit.
    sampled_per_trained: outputs sampled for each that is trained on, where groups are filtered (the paper: 3 to 9 without
    recovery)."""

    response_share: float = 0.5
    sampled_per_trained: float = 2.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step of a stage on all GPUs. flops: done. seconds: by phase."""

    stage: int
    tokens: int
    """Trained on, prompts included."""
    sampled_tokens: int
    flops: dict[str, float]
    model_flops: float
    """Of the update, without recomputation: what MFU counts."""
    seconds: dict[str, float]
    sequences_at_once: int
    """On one engine."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def state_bytes(config: RunConfig) -> tuple[float, float]:
    """Of a master weight, and of its optimizer's moments (`trainer.optimizer`), in matrices whose rows 256 divides."""
    return 2 if config.model.weights == "bfloat16" else 4, 2 + 8 / 256 if config.optimizer.kind == "adamw8bit" else 8


def forward_flops(sizes: Sizes, lengths: int, count: int) -> float:
    """`count` sequences of `lengths` tokens through the layers."""
    return count * (2 * sizes.body * lengths + 2 * sizes.layers * sizes.attention_width * lengths**2)


def head_flops(sizes: Sizes, rows: int) -> float:
    """One GEMM of the output head."""
    return 2 * sizes.head * rows


def computed_again(sizes: Sizes, model: Any, options: LayerOptions, itemsize: int, length: int, count: int) -> float:
    """FLOPs of the layers that the backward of `count` sequences of `length` tokens computes a second time. A layer stops before
    its last product (`down`), whose result no gradient needs; not if it is compiled, whose pieces run whole.

    model: a transformers configuration; itemsize: of the dtype that computes."""
    if not options.checkpointing:
        return 0.0
    tokens = length * count
    attention = 2 * sizes.attention_width * length**2 * count
    matmuls = 2 * sizes.body / sizes.layers * tokens
    down = 0.0 if options.compile else 2 * model.intermediate_size * model.hidden_size * tokens
    kept = plan_kept(sizes.layers, *kept_bytes(model, options.tokens, itemsize), options.saved_bytes)
    return sum(
        (0.0 if layer.attention else attention) + (0.0 if layer.matmuls else matmuls - down) for layer in kept
    )  # fmt: skip


def step_cost(
    config: RunConfig, index: int, sizes: Sizes, model: dict[str, Any], gpus: int, cache_tokens: int, ceilings: Ceilings,
    work: Work, itemsize: int = 2,
) -> StepCost:  # fmt: skip
    """model: config.json. cache_tokens: of one engine; 0: not known. itemsize: of the dtype that computes."""
    stage = config.stages[index]
    response = max(1, round(work.response_share * stage.response_limit))
    prompt = min(PROMPT_TOKENS, stage.data.max_prompt_tokens)
    length, outputs = prompt + response, stage.batch.groups * stage.batch.group_size
    sampled = round(outputs * (work.sampled_per_trained if stage.batch.dynamic else 1.0))
    forward, head = forward_flops(sizes, length, outputs), head_flops(sizes, outputs * response)
    again = computed_again(sizes, SimpleNamespace(**model), layer_options(config), itemsize, length, outputs)
    flops = {
        "score": (forward + head) * (2 if stage.objective.kl_coefficient > 0 else 1),
        "update": 3 * (forward + head) + again,
    }
    rate = gpus * ceilings.flops * ceilings.utilisation
    rollout, at_once = _decode(config, sizes, gpus, cache_tokens, sampled, length, response, ceilings, itemsize)
    seconds = {"rollout": rollout} | {phase: count / rate for phase, count in flops.items()}
    weights, moments = state_bytes(config)
    seconds["sync"] = weights * sizes.parameters * (gpus - 1) / gpus / ceilings.link
    seconds["checkpoint"] = (weights + moments) * sizes.parameters / ceilings.disk / config.checkpoint.every
    return StepCost(
        index, outputs * length, sampled * response, flops, 3 * (forward + head), seconds, at_once
    )  # fmt: skip


def stop_wait(cost: StepCost, config: RunConfig) -> float:
    """Seconds. A request to stop that comes as scoring begins is heard behind the step's push; then a checkpoint is written."""
    step = sum(cost.seconds[phase] for phase in ("score", "update", "sync"))
    return step + cost.seconds["checkpoint"] * config.checkpoint.every


def _decode(
    config: RunConfig, sizes: Sizes, gpus: int, cache_tokens: int, sampled: int, length: int, response: int, ceilings: Ceilings,
    itemsize: int,
) -> tuple[float, int]:  # fmt: skip
    together = config.engine.tensor_parallel
    each = max(1, -(-sampled * together // gpus))
    at_once = min(config.engine.max_sequences, each)
    if cache_tokens:
        at_once = max(1, min(at_once, cache_tokens // length))
    cache = sizes.cache_elements * itemsize * (length - response / 2)
    reading = (sizes.parameters * itemsize + at_once * cache) / (together * ceilings.bandwidth * READ_SHARE)
    computing = 2 * sizes.parameters * at_once / (together * ceilings.flops * ceilings.utilisation)
    return response * each / at_once * max(reading, computing), at_once


def paper_hours(stages: tuple[StageConfig, ...]) -> tuple[int, ...] | None:
    """The paper's, where a run has its three stages: 4K, 8K, 16K."""
    return PAPER_GPU_HOURS if [stage.context for stage in stages] == [4096, 8192, 16384] else None
