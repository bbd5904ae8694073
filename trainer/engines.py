"""The engine that a configuration names, as a run has it: which ranks hold one, and what its pushes are probed with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch

from rollout import engines
from rollout.engine import Engine
from rollout.engines import EngineOptions, Sampled
from rollout.environment import expandable_segments
from rollout.errors import InputError
from rollout.ranks import Ranks
from rollout.vllm.group import GroupMember
from rollout.weights.sync import Probe
from trainer.config import RunConfig
from trainer.config_engine import EngineConfig

PROBE_TOKENS = 160
"""More than the 128 of a CPU engine's cache block."""
SHORT_PROBE_TOKENS = 32
"""For an embedded engine, which has no prefix cache."""
PROBE_NEW_TOKENS = 8


def engine_options(config: EngineConfig) -> EngineOptions:
    return EngineOptions(**{each.name: getattr(config, each.name) for each in fields(EngineOptions)})


def build_engine(
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    end_token_ids: Sequence[int],
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns at once; a vLLM comes up beside whatever is built next. A collective. note: the console's."""
    engine = config.engine
    if engine.kind == "vllm" and device.type == "cuda" and engine.one_step_off:
        raise InputError("engine.one_step_off: kind vllm shares this GPU with the training; set engine.kind to vllm-server")
    if device.type == "cuda" and not engine.embedded and engine.sync_host is None:
        check_allocator(os.environ)
    hosts = engine_hosts(config, ranks)
    alone = None
    if ranks.rank in hosts:
        alone = engines.build(
            engine_options(engine),
            Sampled(config.model.path, device, dtype, config.max_tokens, end_token_ids),
            ranks,
            log=config.run / f"vllm-rank{ranks.rank}.log",
            name=_name(ranks.rank, engine.tensor_parallel),
            seed=config.seed,
            sleeps=device.type == "cuda",
            note=note,
        )
    return alone if len(hosts) == ranks.size else GroupMember(alone, lambda: ranks.all_gather(None))


def build_probe(config: RunConfig, dtype: torch.dtype) -> Probe:
    """Fits the shortest context of the run."""
    model = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    return probe_of(config, dtype, model["vocab_size"])


def probe_of(config: RunConfig, dtype: torch.dtype, vocabulary: int) -> Probe:
    """Of a model that has so many tokens and need not be at hand."""
    exact = dtype is torch.float32 and config.engine.wire == "engine"
    length = min(SHORT_PROBE_TOKENS if config.engine.embedded else PROBE_TOKENS, config.max_tokens - PROBE_NEW_TOKENS)
    bound = config.engine.probe_bound or (1e-3 if exact else 0.5)
    return replace(Probe.of(vocabulary, length, bound), new_tokens=PROBE_NEW_TOKENS)


def engine_hosts(config: RunConfig, ranks: Ranks) -> range:
    """The ranks whose engines are asked. Raises InputError where the ranks cannot be grouped as engine.tensor_parallel asks."""
    together = config.engine.tensor_parallel
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if local % together:
        raise InputError(
            f"engine.tensor_parallel: {together} does not divide the {local} ranks of this host; set it to a divisor, or start "
            "another number of ranks"
        )
    return range(0, ranks.size, together)


def check_allocator(variables: Mapping[str, str]) -> None:
    """Raises InputError, on every rank alike and before anything is loaded, where CUDA's memory cannot be shared with engines."""
    if (name := expandable_segments(variables)) is not None:
        raise InputError(
            f"environment: {name} sets expandable_segments:True, from which no weights can be sent to an engine by CUDA IPC; "
            "unset it"
        )


def _name(rank: int, together: int) -> str:
    return f"rank {rank}'s vLLM" if together == 1 else f"the vLLM of ranks {rank} to {rank + together - 1}"
