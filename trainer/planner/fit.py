"""From what the trainer's tensors hold to what a GPU must hold: the trainer, the engine beside it, and what neither counts.

    peak of a phase  =  tracked · (1 + overhead)  +  push buffers  +  CONTEXT  +  the engine's share

The engine's share is vLLM's own promise (gpu_memory_fraction of the GPU, weights and cache in it) while it is awake. Awake it is
in each phase but score and update: it starts beside the loading, each push is proved by a probe that it continues, and it is
not put to sleep for a checkpoint. What is assumed and not derived is a constant or an argument here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rollout.weights.push import BUFFERS
from rollout.weights.source import TensorMeta
from rollout.weights.wire import largest
from rollout.weights.wire import plan as chunks_of
from trainer.config import RunConfig
from trainer.planner.architecture import Sizes
from trainer.planner.trace import PHASES, StageTrace

GIB = 2**30
CONTEXT = GIB
"""Assumed: CUDA context, NCCL's buffers and cuBLAS workspaces of one process."""
ENGINE_ASLEEP = 2 * GIB
"""Assumed: what a vLLM that sleeps (level 2) keeps: its context, NCCL and captured graphs."""
ENGINE_WORK = 2 * GIB
"""Assumed: activations and workspaces within vLLM's share, which neither weights nor cache may use."""
OVERHEAD = 0.05
"""Assumed: what the caching allocator holds beyond the tensors, as a share of them."""
ASLEEP = ("score", "update")


@dataclass(frozen=True, slots=True)
class Engine:
    """One vLLM's share of one GPU. Bytes."""

    awake: int
    asleep: int
    cache_tokens: int
    """Tokens of prompts and responses that its cache holds, over the GPUs it runs on; 0: no engine here."""


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """One rank in one phase. parts: bytes by what they are for."""

    stage: int
    phase: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def engine_share(config: RunConfig, sizes: Sizes, memory: int, itemsize: int) -> Engine:
    """itemsize: of the compute dtype."""
    engine = config.engine
    weights = sizes.parameters * itemsize
    if engine.kind == "vllm-server":
        return Engine(0, 0, 0)
    if engine.embedded:
        cache = sizes.cache_elements * itemsize * engine.tokens_per_batch
        return Engine(weights + cache, weights, engine.tokens_per_batch)
    together = engine.tensor_parallel
    per_token = sizes.cache_elements * itemsize / min(together, sizes.key_value_heads)
    if engine.kv_cache_gib is not None:
        cache = int(engine.kv_cache_gib * GIB)
        return Engine(weights // together + ENGINE_WORK + cache + CONTEXT, ENGINE_ASLEEP, int(cache / per_token))
    share = int(engine.gpu_memory_fraction * memory)
    cache = max(0, share - weights // together - ENGINE_WORK)
    return Engine(share + CONTEXT, ENGINE_ASLEEP, int(cache / per_token))


def push_buffers(config: RunConfig, metadata: list[TensorMeta], dtype: torch.dtype) -> int:
    """Of the rank that sends, where weights travel through its GPU; kept from the first push on."""
    if config.engine.embedded:
        return 0
    chunks = chunks_of(metadata, dtype, config.engine.wire, config.engine.chunk_mib << 20)
    return min(BUFFERS, len(chunks)) * largest(chunks)


def phases(index: int, traced: StageTrace, engine: Engine, buffers: int, overhead: float) -> list[PhaseMemory]:
    """Of one stage, in the order of a step."""
    rows = []
    for phase in PHASES:
        peak = traced.peaks[phase]
        parts = dict(peak.kinds)
        parts["allocator"] = int(peak.total * overhead)
        parts["push buffers"] = 0 if phase == "load" else buffers
        parts["engine"] = engine.asleep if phase in ASLEEP else engine.awake
        parts["context"] = CONTEXT
        rows.append(PhaseMemory(index, phase, parts))
    return rows
