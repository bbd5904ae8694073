"""Builds an engine of any kind: for training, for an evaluation, for a benchmark."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rollout.engine import Engine
from rollout.errors import InputError
from rollout.kinds import embedded_class
from rollout.model_folder import is_quantized, load_causal_lm
from rollout.ranks import Ranks
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import Deadlines, StoredVllmEngine, VllmEngine
from rollout.vllm.server_engine import ServerEngine
from rollout.vllm.settings import VllmSettings, kv_cache_bytes
from rollout.weights.broadcast import Broadcast
from rollout.weights.push import Sender
from rollout.weights.transport import CudaIpc, SharedMemory, Transport

PATIENCE_SECONDS = 60.0
"""At most, for a server that does not answer yet."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """As in `trainer.config_engine.EngineConfig`, which explains each."""

    kind: str = "transformers"
    servers: tuple[str, ...] = ()
    sync_host: str | None = None
    api_key_env: str = "KEJU_API_KEY"
    max_sequences: int = 256
    tokens_per_batch: int = 65536
    kv_cache_gib: float | None = None
    gpu_memory_fraction: float = 0.85
    threads: int = 1
    tensor_parallel: int = 1
    pack_weights: bool = True
    wire: str = "engine"
    chunk_mib: int = 64
    start_seconds: float = 600.0
    silence_seconds: float | None = 300.0
    """None: an embedded engine has no such deadline."""
    sync_seconds: float = 300.0

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(self.start_seconds, self.silence_seconds, self.sync_seconds)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The model that an engine samples, and where: its Hugging Face folder, the dtype it computes in, the longest prompt and
    response together, the tokens of which any ends an output."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    end_token_ids: Sequence[int]


def build(
    options: EngineOptions,
    model: Sampled,
    ranks: Ranks,
    *,
    log: Path,
    name: str = "vLLM",
    seed: int = 0,
    sleeps: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns at once; a vLLM comes up beside whatever is built next. A collective of the ranks where the engine is servers.

    log: where a vLLM's output goes. name: what to call it in errors. seed: vLLM's own; each request has another. sleeps: whether
    it gives its memory back between rollouts. note: told what a person should see."""
    if options.kind == "vllm":
        return _beside(options, model, log, name, seed, sleeps)
    if options.kind == "vllm-server":
        return _servers(options, model, ranks, note)
    return embedded_class(options.kind)(
        load_causal_lm(model.folder, model.dtype, attention="sdpa").to(model.device),
        end_token_ids=model.end_token_ids,
        tokens_per_batch=options.tokens_per_batch,
        silence_seconds=options.silence_seconds,
    )


def _beside(options: EngineOptions, model: Sampled, log: Path, name: str, seed: int, sleeps: bool) -> VllmEngine:
    """A vLLM of this process's own, on its device."""
    settings = VllmSettings(
        model=str(model.folder.resolve()),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_tokens,
        max_sequences=options.max_sequences,
        kv_cache_bytes=_cache_bytes(options, model),
        gpu_memory_fraction=options.gpu_memory_fraction,
        sleep=sleeps,
        tensor_parallel=options.tensor_parallel,
        pack_weights=options.pack_weights,
        stored=is_quantized(model.folder),
        seed=seed,
    )
    visible = visible_devices(model.device, options.tensor_parallel)
    return (StoredVllmEngine if settings.stored else VllmEngine)(
        lambda: VllmChild(name, settings, log, threads=options.threads, device=visible),
        _sender(options, model, _one_host(model.device)),
        end_token_ids=model.end_token_ids,
        deadlines=options.deadlines,
        sleeps=sleeps,
    )


def _servers(options: EngineOptions, model: Sampled, ranks: Ranks, note: Callable[[str], None]) -> ServerEngine:
    """The ranks share the servers' places; the first pushes."""
    hosts = options.sync_host
    transport = _one_host(model.device) if hosts is None else Broadcast(hosts, model.device, options.sync_seconds)
    return ServerEngine(
        options.servers,
        rank=ranks.rank,
        version_prefix=ranks.broadcast(secrets.token_hex(8) if ranks.first else None),
        end_token_ids=model.end_token_ids,
        sender=_sender(options, model, transport) if ranks.first else None,
        deadlines=options.deadlines,
        concurrency=max(1, options.max_sequences // ranks.size),
        patience=min(PATIENCE_SECONDS, options.start_seconds),
        max_tokens=model.max_tokens,
        api_key_env=options.api_key_env,
        note=note,
    )


def _sender(options: EngineOptions, model: Sampled, transport: Transport) -> Sender:
    return Sender(model.dtype, options.wire, options.chunk_mib << 20, transport)


def _one_host(device: torch.device) -> Transport:
    return CudaIpc(device) if device.type == "cuda" else SharedMemory()


def _cache_bytes(options: EngineOptions, model: Sampled) -> int | None:
    """Of keys and values. None on a GPU where nothing is asked: vLLM takes what gpu_memory_fraction leaves."""
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * 2**30)
    if model.device.type == "cuda":
        return None
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    return kv_cache_bytes(config, model.dtype.itemsize, options.max_sequences, model.max_tokens)


def visible_devices(device: torch.device, count: int) -> str | None:
    """The device and those behind it, `count` in all, as CUDA_VISIBLE_DEVICES names them; None for a CPU. Raises InputError where
    there are not so many."""
    if device.type != "cuda":
        return None
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]
    wanted = names[device.index : device.index + count]
    if len(wanted) < count:
        where = f"CUDA_VISIBLE_DEVICES={listed}" if listed else "CUDA_VISIBLE_DEVICES is not set"
        raise InputError(
            f"tensor parallel {count}: one engine's GPUs begin at number {device.index}, and this process sees {len(names)} "
            f"({where}); show it more or ask for fewer"
        )
    return ",".join(wanted)
