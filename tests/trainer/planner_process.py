"""A step of a small model in this process, without the tracker, for test_planner_memory.py: prints how far its resident memory
rose over what the interpreter and its libraries held, and what was planned.

`planner_process.py HIDDEN LAYERS CHECKPOINTING`
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from tiny_policy import one_rank, stage
from transformers import Qwen2Config

from trainer.attention import NAME as PACKED_ATTENTION
from trainer.config import ModelConfig, ObjectiveConfig, RunConfig
from trainer.engines import probe_of
from trainer.planner.memory import MemoryTracker
from trainer.planner.trace import prepare, run_stage, trace, traced_options
from trainer.policy import empty_policy

TOKENS, VOCABULARY = 1024, 4000


class NoTracker(MemoryTracker):
    """Sees nothing."""

    def _see(self, *_: object) -> None: ...


def config_of(folder: Path, checkpointing: bool) -> RunConfig:
    one = stage(ObjectiveConfig(), mini=1, tokens_per_micro_batch=TOKENS)
    one = one.model_copy(update={"context": TOKENS})
    return RunConfig(run=Path("run"), model=ModelConfig(path=folder, gradient_checkpointing=checkpointing), stages=(one,))


def step(config: RunConfig) -> None:
    with one_rank() as mesh:
        policy = empty_policy(config.model.path, mesh, traced_options(config, torch.float32))
        with NoTracker() as tracker:
            actor, load = prepare(tracker, [policy], config, 1)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.normal_(0, 0.02)
            run_stage(tracker, actor, config.stages[0], 1, load, probe_of(config, torch.float32, VOCABULARY))


def main(hidden: int, layers: int, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what a tensor gives back goes back at once
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=2, attn_implementation=PACKED_ATTENTION,
        ).save_pretrained(folder)  # fmt: skip
        config = config_of(folder, checkpointing)
        planned = trace(config, folder, 1, torch.float32, "cpu").stages[0].peaks["update"].total
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step(config)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"planned": planned, "risen": peak - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")
