"""A policy whose matrices adamw8bit codes, trained on several ranks, for test_optimizer.py.

As a script it is one rank of two: RANK in the environment, `optimizer_ranks.py RENDEZVOUS FOLDER` on the command line.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_policy import VOCABULARY, batches, stage, whole_weights
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout.ranks import Ranks
from trainer.actor import Actor
from trainer.adamw8bit import local
from trainer.attention import NAME as PACKED_ATTENTION
from trainer.checkpoint import Checkpoints, RunState
from trainer.config import CheckpointConfig, ObjectiveConfig, OptimizerConfig
from trainer.distributed import MESH_NAMES
from trainer.optimizer import build_optimizer
from trainer.policy import PolicyOptions, sharded

RANKS = 2
STAGE = stage(ObjectiveConfig(), mini=1, micro=2, weight_decay=0.1)
EIGHT_BIT = OptimizerConfig(kind="adamw8bit")


def coded_lm() -> Qwen2ForCausalLM:
    """Its rows have 64, 128 and 256 values, and its embedding 61 rows, which two ranks do not share evenly."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=False,
        attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def coded_actor(mesh: DeviceMesh, weights: torch.dtype, optimizer: OptimizerConfig = EIGHT_BIT) -> Actor:
    options = PolicyOptions(weights, weights=weights)
    policy = sharded(coded_lm().to(weights), mesh, options)
    built = build_optimizer(policy, STAGE.actor, optimizer, seed=5)
    device = torch.device("cpu")
    return Actor(policy, STAGE.actor, rank=mesh.get_rank(), ranks=mesh.size(), device=device, optimizer=built)


def updated(actor: Actor, times: int = 1) -> Actor:
    for _ in range(times):
        result = actor.update(actor.score(batches(STAGE), STAGE)[0], STAGE)
        assert not result.skipped, asdict(result)
    return actor


def whole_moments(actor: Actor) -> dict[str, dict[str, torch.Tensor]]:
    """By weight and name."""
    found = {}
    for name, parameter in actor.policy.named_parameters():
        state = actor.optimizer.state[parameter]
        found[name] = {key: getattr(value, "full_tensor", lambda value=value: value)().clone() for key, value in state.items()}
    return found


def main(rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    ranks = Ranks(rank, RANKS, dist.new_group(backend="gloo"))
    shards = init_device_mesh("cpu", (RANKS,), mesh_dim_names=MESH_NAMES[-1:])
    copies = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=MESH_NAMES)

    exact = updated(coded_actor(shards, torch.float32), 2)
    found = {"fp32": whole_weights(exact.policy), "moments": whole_moments(exact)}
    rounded = updated(coded_actor(copies, torch.bfloat16), 2)
    found["copy"] = {name: local(weight.detach()).clone() for name, weight in rounded.policy.named_parameters()}

    checkpoints = Checkpoints(Path(folder) / "run", ranks, CheckpointConfig(keep=1), lambda _: None)
    going = updated(coded_actor(shards, torch.bfloat16), 2)
    checkpoints.save(going, RunState(step=2), wait=True)
    found["saved"] = {"weights": whole_weights(going.policy), "moments": whole_moments(going)}
    found["went on"] = whole_weights(updated(going).policy)
    again = coded_actor(shards, torch.bfloat16)
    checkpoints.resume(again)
    found["resumed"] = whole_weights(updated(again).policy)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
