"""The engine of an evaluation, and what keeps its weights: the folder's own, pushed as a run's are, or, where they are quantized,
loaded by vLLM as they are."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rollout import engines
from rollout.engine import Engine
from rollout.engines import EngineOptions, Sampled
from rollout.kinds import EMBEDDED
from rollout.model_folder import is_quantized
from rollout.ranks import Ranks
from rollout.weights.folder import FolderWeights
from rollout.weights.source import TensorMeta, WeightSource
from rollout.weights.sync import WeightSync


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """Of the command line."""
    found = EngineOptions(
        kind=options.engine,
        servers=tuple(options.server),
        sync_host=options.sync_host,
        max_sequences=options.max_sequences,
        tokens_per_batch=options.tokens_per_batch,
        kv_cache_gib=options.kv_cache_gib,
        gpu_memory_fraction=options.gpu_memory_fraction,
        threads=options.threads or 1,
        tensor_parallel=options.tensor_parallel,
    )
    # A prefill on a CPU may take longer than any deadline that is fair to a vLLM, and somebody watches.
    return replace(found, silence_seconds=None) if found.kind in EMBEDDED else found


def dtype_of(name: str) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU, as in training."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def build(
    options: argparse.Namespace, max_tokens: int, end_token_ids: Sequence[int], log: Path, note: Callable[[str], None]
) -> tuple[Engine, WeightSync]:
    """Returns before the engine is ready; `WeightSync.push` waits for it. max_tokens: of prompt and response together. log: where
    a vLLM's output goes. note: told what a person should see."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder, asked = options.model, engine_options(options)
    weights: WeightSource = Nothing() if is_quantized(folder) else FolderWeights(folder, device)
    if options.engine in EMBEDDED and options.threads is not None:
        torch.set_num_threads(options.threads)
    model = Sampled(folder, device, dtype_of(options.dtype), max_tokens, end_token_ids)
    engine = engines.build(asked, model, Ranks(), log=log, note=note)
    return engine, WeightSync(engine, weights, Ranks(), seconds=asked.sync_seconds, note=note)


class Nothing:
    """`rollout.weights.source.WeightSource` of an engine that has its weights already."""

    def metadata(self) -> list[TensorMeta]:
        return []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())
