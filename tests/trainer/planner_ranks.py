"""The planner's tracker over real tensors on real ranks, for test_planner_memory.py: one process of two.

`planner_ranks.py RENDEZVOUS OUTPUT`, RANK in the environment. All cases in one launch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_policy import VOCABULARY, causal_lm, stage
from torch.distributed.device_mesh import init_device_mesh

from trainer.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, RunConfig
from trainer.distributed import MESH_NAMES, mesh_shape
from trainer.engines import probe_of
from trainer.optimizer import ADAMW
from trainer.planner.memory import WEIGHTS, MemoryTracker, Peak
from trainer.planner.trace import prepare, run_stage, traced_options
from trainer.policy import empty_policy

RANKS = 2


@dataclass(frozen=True)
class Case:
    tied: bool = False
    checkpointing: bool = False
    reference: bool = False
    bf16: bool = False
    shard_ranks: int | None = None
    weights: str = "float32"
    optimizer: OptimizerConfig = ADAMW

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def config(self) -> RunConfig:
        objective = ObjectiveConfig(kl_coefficient=0.1 if self.reference else 0.0)
        return RunConfig(
            run=Path("run"),
            model=ModelConfig(path=Path("model"), gradient_checkpointing=self.checkpointing, weights=self.weights),
            optimizer=self.optimizer,
            parallel=ParallelConfig(shard_ranks=self.shard_ranks),
            stages=(stage(objective, mini=1, tokens_per_micro_batch=150),),
        )


CASES = [
    Case(),
    Case(checkpointing=True, bf16=True),
    Case(tied=True),
    Case(tied=True, reference=True, bf16=True),
    Case(shard_ranks=1, bf16=True),
    Case(optimizer=OptimizerConfig(offload=True)),
    Case(bf16=True, weights="bfloat16", optimizer=OptimizerConfig(kind="adamw8bit")),
    Case(bf16=True, weights="bfloat16", optimizer=OptimizerConfig(kind="adamw8bit", gradients="bfloat16")),
]
TIMES = 3


def measure(case: Case) -> dict[str, Peak]:
    config = case.config()
    shape = mesh_shape(RANKS, case.shard_ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=MESH_NAMES[-len(shape) :])
    with tempfile.TemporaryDirectory() as folder:
        causal_lm(tied=case.tied).config.save_pretrained(folder)
        options = traced_options(config, case.precision)
        policies = [empty_policy(Path(folder), mesh, options)]
        if case.reference:
            policies.append(empty_policy(Path(folder), mesh, replace(options, trainable=False)))
    with MemoryTracker("cpu") as tracker:
        actor, load = prepare(tracker, policies, config, RANKS)
        with torch.no_grad(), tracker.counting_as(WEIGHTS):
            for policy in policies:
                for parameter in policy.parameters():
                    parameter.normal_(0, 0.02)
        probe = probe_of(config, case.precision, VOCABULARY)
        return run_stage(tracker, actor, config.stages[0], RANKS, load, probe).peaks


def least(case: Case) -> dict[str, Peak]:
    """Of several times, since gloo's thread may let go of a buffer late: it can only add."""
    times = [measure(case) for _ in range(TIMES)]
    return {phase: min((peaks[phase] for peaks in times), key=lambda peak: peak.total) for phase in times[0]}


def main(rendezvous: str, output: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    found = [{phase: asdict(peak) for phase, peak in least(case).items()} for case in CASES]
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
