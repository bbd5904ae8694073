"""Builds the engine that a configuration names."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rollout.engine import Engine
from rollout.errors import InputError
from rollout.kinds import embedded_class
from rollout.ranks import Ranks
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import Deadlines, VllmEngine
from rollout.vllm.group import GroupMember
from rollout.vllm.server_engine import ServerEngine
from rollout.vllm.settings import VllmSettings, kv_cache_bytes
from rollout.weights.broadcast import Broadcast
from rollout.weights.push import Sender
from rollout.weights.sync import Probe
from rollout.weights.transport import CudaIpc, SharedMemory, Transport
from trainer.config import RunConfig
from trainer.policy import load_causal_lm

PROBE_TOKENS = 160
"""More than the 128 of a CPU engine's cache block."""
SHORT_PROBE_TOKENS = 32
"""For an embedded engine, which has no prefix cache."""
PROBE_NEW_TOKENS = 8


def build_engine(
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    end_token_ids: Sequence[int],
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns at once; a vLLM comes up beside whatever is built next. A collective. note: the console's."""
    if config.engine.kind == "vllm":
        return _colocated(config, ranks, device, dtype, end_token_ids)
    if config.engine.kind == "vllm-server":
        return _servers(config, ranks, device, dtype, end_token_ids, note)
    return embedded_class(config.engine.kind)(
        load_causal_lm(config.model.path, dtype, attention="sdpa").to(device),
        end_token_ids=end_token_ids,
        tokens_per_batch=config.engine.tokens_per_batch,
        silence_seconds=config.engine.silence_seconds,
    )


def build_probe(config: RunConfig, dtype: torch.dtype) -> Probe:
    """Fits the shortest context of the run."""
    model = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    exact = dtype is torch.float32 and config.engine.wire == "engine"
    length = min(SHORT_PROBE_TOKENS if config.engine.embedded else PROBE_TOKENS, config.max_tokens - PROBE_NEW_TOKENS)
    bound = config.engine.probe_bound or (1e-3 if exact else 0.5)
    return replace(Probe.of(model["vocab_size"], length, bound), new_tokens=PROBE_NEW_TOKENS)


def _colocated(
    config: RunConfig, ranks: Ranks, device: torch.device, dtype: torch.dtype, end_token_ids: Sequence[int]
) -> VllmEngine | GroupMember:
    engine = config.engine
    if device.type == "cuda" and engine.one_step_off:
        raise InputError("engine.one_step_off: kind vllm shares this GPU with the training; set engine.kind to vllm-server")
    hosts = engine_hosts(config, ranks)
    alone = None
    if ranks.rank in hosts:
        transport = CudaIpc(device) if device.type == "cuda" else SharedMemory()
        alone = VllmEngine(
            child_starter(config, ranks, device, dtype),
            Sender(dtype, engine.wire, engine.chunk_mib << 20, transport),
            end_token_ids=end_token_ids,
            deadlines=Deadlines(engine.start_seconds, engine.silence_seconds, engine.sync_seconds),
            sleeps=device.type == "cuda",
        )
    return alone if len(hosts) == ranks.size else GroupMember(alone, lambda: ranks.all_gather(None))


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


def _servers(
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    end_token_ids: Sequence[int],
    note: Callable[[str], None],
) -> ServerEngine:
    engine = config.engine
    sender = Sender(dtype, engine.wire, engine.chunk_mib << 20, server_transport(config, device))
    return ServerEngine(
        engine.servers,
        rank=ranks.rank,
        version_prefix=ranks.broadcast(secrets.token_hex(8) if ranks.first else None),
        end_token_ids=end_token_ids,
        sender=sender if ranks.first else None,
        deadlines=Deadlines(engine.start_seconds, engine.silence_seconds, engine.sync_seconds),
        concurrency=max(1, engine.max_sequences // ranks.size),
        patience=min(60.0, engine.start_seconds),
        api_key_env=engine.api_key_env,
        note=note,
    )


def server_transport(config: RunConfig, device: torch.device) -> Transport:
    """How weights reach the servers: shared memory or CUDA IPC where all of them are on this host, else a broadcast to each
    host."""
    if config.engine.sync_host is not None:
        return Broadcast(config.engine.sync_host, device, config.engine.sync_seconds)
    return CudaIpc(device) if device.type == "cuda" else SharedMemory()


def child_starter(config: RunConfig, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Callable[[], VllmChild]:
    """What starts this rank's vLLM, each time anew."""
    engine, path = config.engine, config.model.path
    model = json.loads((path / "config.json").read_text(encoding="utf-8"))
    cache = None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * 2**30)
    if cache is None and device.type == "cpu":
        cache = kv_cache_bytes(model, dtype.itemsize, engine.max_sequences, config.max_tokens)
    settings = VllmSettings(
        model=str(path.resolve()),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.max_tokens,
        max_sequences=engine.max_sequences,
        kv_cache_bytes=cache,
        gpu_memory_fraction=engine.gpu_memory_fraction,
        sleep=device.type == "cuda",
        tensor_parallel=engine.tensor_parallel,
        pack_weights=engine.pack_weights,
        seed=config.seed,
    )
    last = ranks.rank + engine.tensor_parallel - 1
    name = f"rank {ranks.rank}'s vLLM" if last == ranks.rank else f"the vLLM of ranks {ranks.rank} to {last}"
    log = config.run / f"vllm-rank{ranks.rank}.log"
    return lambda: VllmChild(name, settings, log, threads=engine.threads, device=_visible(device, engine.tensor_parallel))


def _visible(device: torch.device, count: int) -> str | None:
    """The device and those behind it, `count` in all, as CUDA_VISIBLE_DEVICES names them; None for a CPU."""
    if device.type != "cuda":
        return None
    wanted = range(device.index, device.index + count)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else None
    return ",".join(names[index] if names else str(index) for index in wanted)
