"""`python -m benchmarks.decode_attention [--out FILE]`: one token's attention on a CPU, ours against PyTorch's SDPA.

SmolLM2-135M's shape (9 heads, 3 key-value heads, d = 64), 64 sequences of 250 tokens. SDPA gets its keys and values repeated, as
transformers calls it, or grouped itself (enable_gqa). One process, the variants in turn in every round, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from rollout.decode_attention import decode_attention
from trainer import cli
from trainer.environment import provenance

BATCH, HEADS, SHARED, LENGTH, DIM = 64, 9, 3, 250, 64
ROUNDS = 30


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_attention", description="One token's attention on a CPU.")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    results = {str(dtype).removeprefix("torch."): measure(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, milliseconds in results.items():
        ours = milliseconds["ours"]
        print(name, " ".join(f"{variant} {value:.2f} ms ({value / ours:.1f}×)" for variant, value in milliseconds.items()))
    if options.out is not None:
        record = {"median_ms": results, "threads": torch.get_num_threads(), "machine": provenance()}
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of each variant."""
    query = torch.randn(BATCH, HEADS, 1, DIM, dtype=dtype)
    key, value = (torch.randn(BATCH, SHARED, LENGTH, DIM, dtype=dtype) for _ in range(2))
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    module = torch.nn.Module()

    def repeated() -> torch.Tensor:
        whole = (tensor.repeat_interleave(HEADS // SHARED, 1) for tensor in (key, value))
        return functional.scaled_dot_product_attention(query, *whole, attn_mask=mask)

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: decode_attention(module, query, key, value, mask, scaling=DIM**-0.5),
        "sdpa, repeated": repeated,
        "sdpa, grouped": lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    cli.run(main)
