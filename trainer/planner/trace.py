"""What the trainer itself holds on one rank, phase by phase: the real code of `trainer.policy` and `trainer.actor`, run on fake
tensors in a process group that only pretends, of any size.

Nothing is computed and no memory is taken, but shapes, the order of operations, FSDP's gathering and freeing, autograd's saved
tensors and the optimizer's states are what a rank would have. Fake tensors live on the CPU: FSDP2 and autograd do there as on a
GPU; attention is SDPA's flash kernel for CPUs, which keeps what a GPU's keeps; the loss head's chunks are taken as on the GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.weights.source import TensorMeta
from rollout.weights.sync import Probe
from trainer import layers
from trainer.actor import Actor
from trainer.adamw8bit import PIECE, WORKSPACE, AdamW8bit
from trainer.attention import MIN_FILL
from trainer.batch import MiniBatch, TokenSequence
from trainer.config import RunConfig, StageConfig
from trainer.distributed import MESH_NAMES, mesh_shape
from trainer.engines import probe_of
from trainer.loading import allocate
from trainer.optimizer import build_optimizer
from trainer.planner.memory import HOST, OPTIMIZER, WEIGHTS, MemoryTracker, Peak
from trainer.policy import Policy, PolicyOptions, PolicyWeights, empty_policy, policy_options
from trainer.probe import policy_scorer

MICRO_BATCHES = 2
"""Traced a mini-batch: the second adds to the gradients of the first, and more than that change nothing."""
PHASES = ("load", "rollout", "score", "update", "sync", "checkpoint")


@dataclass(frozen=True, slots=True)
class StageTrace:
    """peaks: by phase, what the trainer's tensors hold; "rollout": what stays while the engine samples."""

    stage: StageConfig
    tokens: int
    """Of the largest micro-batch that was traced."""
    peaks: dict[str, Peak]


@dataclass(frozen=True, slots=True)
class Traced:
    """stages: by index. metadata: the model's tensors, as `rollout.weights` sees them."""

    stages: dict[int, StageTrace]
    metadata: list[TensorMeta]


@contextmanager
def fake_ranks(ranks: int, shard_ranks: int | None = None) -> Iterator[DeviceMesh]:
    """The mesh of a process group in which this process is rank 0 and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape = mesh_shape(ranks, shard_ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=MESH_NAMES[-len(shape) :])
    finally:
        dist.destroy_process_group()


def numbers_for_numpy() -> AbstractContextManager:
    """Ones where code asks a fake tensor for an array, which it refuses; for metrics, which nobody reads here."""
    return mock.patch.object(FakeTensor, "numpy", lambda tensor: np.ones(tensor.shape), create=True)


@contextmanager
def offloaded_to_host(tracker: MemoryTracker) -> Iterator[None]:
    """Activations that wait on the host are in no GPU's memory, though here both are the CPU's."""
    to_host = layers.to_host

    def counted(tensor: Tensor) -> Tensor:
        with tracker.counting_as(HOST):
            return to_host(tensor)

    with mock.patch.object(layers, "to_host", counted):
        yield


def trace(
    config: RunConfig, folder: Path, ranks: int, precision: torch.dtype, device_type: str = "cuda", stages: Sequence[int] = (0,)
) -> Traced:
    """The stages of these indices, on rank 0, whose shards are the largest. folder: holds the model's config.json; no weights are
    read. device_type: where the run will be."""
    with fake_ranks(ranks, config.parallel.shard_ranks) as mesh:
        options = traced_options(config, precision)
        policies = [empty_policy(folder, mesh, options)]
        probe = probe_of(config, precision, policies[0].causal_lm.config.vocab_size)
        if any(stage.objective.kl_coefficient > 0 for stage in config.stages):
            policies.append(empty_policy(folder, mesh, replace(options, trainable=False)))
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            numbers_for_numpy(),
            MemoryTracker(device_type) as tracker,
            offloaded_to_host(tracker),
        ):
            actor, load = prepare(tracker, policies, config, ranks, device_type)
            traced = {index: run_stage(tracker, actor, config.stages[index], ranks, load, probe) for index in stages}
        return Traced(traced, PolicyWeights(policies[0]).metadata())


def traced_options(config: RunConfig, precision: torch.dtype) -> PolicyOptions:
    """The run's, with what runs on fake tensors: attention by SDPA, no compiler."""
    model = config.model.model_copy(update={"attention": "sdpa", "compile": False})
    return policy_options(config.model_copy(update={"model": model}), precision, torch.device("cpu"))


def prepare(
    tracker: MemoryTracker, policies: list[Policy], config: RunConfig, ranks: int, device_type: str = "cpu"
) -> tuple[Actor, Peak]:
    """The actor over a policy and perhaps its reference, with memory and moments, and what loading them took."""
    device, config_actor = torch.device("cpu"), config.stages[0].actor
    with tracker.phase() as load, tracker.counting_as(WEIGHTS):
        for policy in policies:
            allocate(policy, device)
    policy, reference = policies[0], policies[1] if len(policies) > 1 else None
    with tracker.counting_as(HOST if config.optimizer.offload else OPTIMIZER):
        optimizer = build_optimizer(policy, config_actor, config.optimizer, seed=config.seed, fused=device_type == "cuda")
    if device_type == "cuda" and isinstance(optimizer, AdamW8bit):
        optimizer.piece = PIECE["cuda"]
        optimizer.update_coded = optimizer.update_plain = hold_workspace
    actor = Actor(policy, config_actor, rank=0, ranks=ranks, device=device, reference=reference, optimizer=optimizer)
    return actor, load[0]


def hold_workspace(weight: Tensor, *_: Tensor | None) -> None:
    """In place of the compiled update of a piece, whose temporaries no dispatch mode sees."""
    torch.empty(WORKSPACE * weight.numel(), dtype=torch.uint8)


def run_stage(tracker: MemoryTracker, actor: Actor, stage: StageConfig, ranks: int, load: Peak, probe: Probe) -> StageTrace:
    """One step. "rollout" is what the push leaves behind."""
    # Neither changes what is held: which sign is right is not known without numbers, and the largest micro-batch is traced.
    stage = stage.model_copy(
        update={
            "objective": stage.objective.model_copy(update={"entropy_target": None}),
            "actor": stage.actor.model_copy(update={"micro_batches": None}),
        }
    )
    group = actor.policy.attention.group
    batch = fullest(stage, ranks, group.size if group else 1)
    peaks = {"load": load}
    with tracker.phase() as peak:
        [scored] = actor.score([batch], stage)
    peaks["score"] = peak[0]
    tokens = max(len(micro.input_ids_T) for micro in scored.micro)
    with tracker.phase() as peak:
        actor.update(scored, stage)
    peaks["update"] = peak[0]
    del scored
    with tracker.phase() as peak:
        deque(actor.policy.whole_weights(), maxlen=0)
        score_probe(actor.policy, probe)
    peaks["sync"] = peak[0]
    with tracker.phase() as peak:
        pass
    peaks["rollout"] = peak[0]
    with tracker.phase() as peak:
        get_state_dict(actor.policy, actor.optimizer)
    peaks["checkpoint"] = peak[0]
    return StageTrace(stage, tokens, {phase: peaks[phase] for phase in PHASES})


def score_probe(policy: Policy, probe: Probe) -> None:
    """What every rank does once an engine has continued the probe's prompt, `probe.copies` times."""
    continued = np.zeros(probe.new_tokens, dtype=np.int32)
    policy_scorer(policy, torch.device("cpu"))([probe.prompt] * probe.copies, [continued] * probe.copies)


def fullest(stage: StageConfig, ranks: int, together: int = 1) -> MiniBatch:
    """A mini-batch that costs the most memory its stage allows: every micro-batch full, all but a token of it response (the head
    works on response tokens), and lengths that differ so that attention pads as much as it may. together: ranks that share
    one."""
    longest, budget = stage.context, stage.actor.tokens_per_micro_batch * together
    others = math.ceil(MIN_FILL * longest)
    count, rest = divmod(budget - longest, others)
    lengths = [longest] + [others] * count + ([rest] if rest >= 2 else [])
    total = stage.batch.groups * stage.batch.group_size // stage.batch.mini_batches
    every = [length for length in lengths for _ in range(MICRO_BATCHES * ranks // together)][:total]
    return MiniBatch(tuple(sequence(length) for length in every))


def sequence(tokens: int) -> TokenSequence:
    response = np.zeros(tokens - 1, dtype=np.int32)
    return TokenSequence(np.zeros(1, dtype=np.int32), response, response.astype(np.float32), 1.0, 1.0)
