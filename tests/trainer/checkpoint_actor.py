"""Small actors and states to save, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tiny_policy import batches, build_actor, stage
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rollout.ranks import Ranks
from rollout.recovery import Ledger
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.actor import Actor
from trainer.adamw8bit import local
from trainer.checkpoint import Checkpoints, RunState
from trainer.checkpoint_tensors import tensors_of
from trainer.config import CheckpointConfig, ObjectiveConfig

STAGE = stage(ObjectiveConfig(), mini=1, micro=2, weight_decay=0.1)


def small_actor(mesh: DeviceMesh) -> Actor:
    return build_actor(mesh, STAGE)


def update(actor: Actor, times: int = 1) -> list[dict]:
    """On one batch, scored under the weights of now. Returns what each update found."""
    [scored] = actor.score(batches(STAGE), STAGE)
    results = [asdict(actor.update(scored, STAGE)) for _ in range(times)]
    assert [result.pop("fault") for result in results] == [None] * times
    return results


def state_at(step: int, groups: int = 2) -> RunState:
    """Rank 0's, with a ledger, a buffer and a cursor that tell the step."""
    samples = tuple(
        Sample(np.arange(3 + k, dtype=np.int32), np.full(3 + k, -0.5, dtype=np.float32), "stop", step) for k in range(2)
    )
    verdicts = (Verdict(True, "right"), Verdict(False, "wrong", "1 ≠ 2"))
    buffer = [Group(Prompt(f"q{at}", "?", "!"), np.arange(4, dtype=np.int32), samples, verdicts, step) for at in range(groups)]
    ledger = Ledger(drawn=10 * step + groups, trained=10 * step)
    return RunState(step, ledger, buffer, {"train.jsonl": {"position": step, "count": 40}})


def values_of(actor: Actor) -> dict[str, Tensor]:
    """Copies of this rank's shards, weights and moments."""
    return {name: local(tensor).clone() for name, tensor in tensors_of(actor).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def checkpoints(run: Path, note: Callable[[str], None] = lambda _: None, ranks: Ranks | None = None, **config) -> Checkpoints:
    score = config.pop("score", lambda _: None)
    return Checkpoints(run, ranks or Ranks(), CheckpointConfig(**config), note, score)


def names(run: Path) -> list[str]:
    """What lies among a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
