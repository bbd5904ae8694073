"""Builds the engine of an evaluation, and the one that keeps its weights: the folder's own, pushed as a run's are, or, where they
are quantized, loaded by vLLM as they are."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rollout.engine import Engine
from rollout.kinds import embedded_class
from rollout.model_folder import is_quantized, load_causal_lm
from rollout.ranks import Ranks
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import Deadlines, StoredVllmEngine, VllmEngine
from rollout.vllm.server_engine import ServerEngine
from rollout.vllm.settings import VllmSettings, kv_cache_bytes
from rollout.weights.broadcast import Broadcast
from rollout.weights.folder import FolderWeights
from rollout.weights.push import Sender
from rollout.weights.source import TensorMeta, WeightSource
from rollout.weights.sync import WeightSync
from rollout.weights.transport import CudaIpc, SharedMemory, Transport

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """As in `trainer.config.EngineConfig`, where each is explained. dtype: "auto", "float32" or "bfloat16"."""

    kind: str = "transformers"
    dtype: str = "auto"
    servers: tuple[str, ...] = ()
    sync_host: str | None = None
    api_key_env: str = "KEJU_API_KEY"
    max_sequences: int = 256
    tokens_per_batch: int = 65536
    kv_cache_gib: float | None = None
    gpu_memory_fraction: float = 0.85
    tensor_parallel: int = 1
    threads: int | None = None
    """On a CPU: the engine's; None: 1 for vllm, all cores for transformers."""
    start_seconds: float = 600.0
    silence_seconds: float = 300.0
    sync_seconds: float = 300.0

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(self.start_seconds, self.silence_seconds, self.sync_seconds)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """Of the command line."""
    return EngineOptions(
        kind=options.engine,
        dtype=options.dtype,
        servers=tuple(options.server),
        sync_host=options.sync_host,
        max_sequences=options.max_sequences,
        tokens_per_batch=options.tokens_per_batch,
        kv_cache_gib=options.kv_cache_gib,
        gpu_memory_fraction=options.gpu_memory_fraction,
        tensor_parallel=options.tensor_parallel,
        threads=options.threads,
    )


def dtype_of(options: EngineOptions) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU, as in training."""
    if options.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, options.dtype)


def build(
    options: EngineOptions, model: Path, max_tokens: int, end_token_ids: Sequence[int], log: Path, note: Callable[[str], None]
) -> tuple[Engine, WeightSync]:
    """Returns before the engine is ready; `WeightSync.push` waits for it. max_tokens: of prompt and response together. log: where
    a vLLM's output goes. note: told what a person should see."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    weights: WeightSource = Nothing() if is_quantized(model) else FolderWeights(model, device)
    dtype = dtype_of(options)
    if options.kind == "vllm":
        engine: Engine = _colocated(options, model, max_tokens, end_token_ids, log, device, dtype)
    elif options.kind == "vllm-server":
        engine = _servers(options, end_token_ids, device, dtype, note)
    else:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        policy = load_causal_lm(model, dtype, attention="sdpa").to(device)
        engine = embedded_class(options.kind)(policy, end_token_ids=end_token_ids, tokens_per_batch=options.tokens_per_batch)
    return engine, WeightSync(engine, weights, Ranks(), seconds=options.sync_seconds, note=note)


class Nothing:
    """`rollout.weights.source.WeightSource` of an engine that has its weights already."""

    def metadata(self) -> list[TensorMeta]:
        return []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


def _colocated(
    options: EngineOptions,
    model: Path,
    max_tokens: int,
    end_token_ids: Sequence[int],
    log: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> VllmEngine:
    cache = None if options.kv_cache_gib is None else int(options.kv_cache_gib * 2**30)
    if cache is None and device.type == "cpu":
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        cache = kv_cache_bytes(config, dtype.itemsize, options.max_sequences, max_tokens)
    settings = VllmSettings(
        model=str(model.resolve()),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_tokens,
        max_sequences=options.max_sequences,
        kv_cache_bytes=cache,
        gpu_memory_fraction=options.gpu_memory_fraction,
        tensor_parallel=options.tensor_parallel,
        stored=is_quantized(model),
    )
    visible = None
    if device.type == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        visible = ",".join(listed.split(",")[: options.tensor_parallel])
    transport = CudaIpc(device) if device.type == "cuda" else SharedMemory()
    return (StoredVllmEngine if settings.stored else VllmEngine)(
        lambda: VllmChild("vLLM", settings, log, threads=options.threads or 1, device=visible),
        Sender(dtype, "engine", CHUNK_BYTES, transport),
        end_token_ids=end_token_ids,
        deadlines=options.deadlines,
    )


def _servers(
    options: EngineOptions, end_token_ids: Sequence[int], device: torch.device, dtype: torch.dtype, note: Callable[[str], None]
) -> ServerEngine:
    if options.sync_host is not None:
        transport: Transport = Broadcast(options.sync_host, device, options.sync_seconds)
    else:
        transport = CudaIpc(device) if device.type == "cuda" else SharedMemory()
    return ServerEngine(
        options.servers,
        rank=0,
        version_prefix=secrets.token_hex(8),
        end_token_ids=end_token_ids,
        sender=Sender(dtype, "engine", CHUNK_BYTES, transport),
        deadlines=options.deadlines,
        concurrency=options.max_sequences,
        patience=min(60.0, options.start_seconds),
        api_key_env=options.api_key_env,
        note=note,
    )
