"""The trainer's own actor over random weights, one policy for all ways to keep activations, which take turns in every round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from benchmarks.kernels.timing import orders
from benchmarks.train_step.operations import gemm_rate, layer_shapes, synchronize
from benchmarks.train_step.phases import watched
from benchmarks.train_step.setting import random_batch
from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer.actor import Actor
from trainer.config import RunConfig
from trainer.layers import prepare_layers
from trainer.loading import allocate
from trainer.optimizer import build_optimizer
from trainer.policy import Policy, PolicyOptions, empty_policy, policy_options


@dataclass(slots=True)
class Figures:
    """Of one way: a value a round. score, update: seconds of rounds without marks. score_phases, update_phases: of rounds with.
    allocated, reserved: bytes, the most of the update on a GPU."""

    score: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    score_phases: list[dict[str, float]] = field(default_factory=list)
    update_phases: list[dict[str, float]] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    grad_norm: float = 0.0


class Bench:
    """ways: the first one's optimizer and attention are everybody's."""

    def __init__(self, ways: Mapping[str, RunConfig], ranks: Ranks, mesh: DeviceMesh, device: torch.device) -> None:
        self._ways = ways
        self.config = next(iter(ways.values()))
        self.stage = self.config.stages[0]
        self.device = device
        self.precision = getattr(torch, self.config.model.precision)
        self.options = {name: policy_options(config, self.precision, device) for name, config in ways.items()}
        first = next(iter(self.options.values()))
        self.policy = random_policy(self.config.model.path, mesh, first, device, self.config.seed)
        optimizer = build_optimizer(self.policy, self.stage.actor, self.config.optimizer, seed=self.config.seed)
        self.actor = Actor(self.policy, self.stage.actor, rank=ranks.rank, ranks=ranks.size, device=device, optimizer=optimizer)
        self.batch = random_batch(self.config, self.policy.causal_lm.config.vocab_size)
        self._layers: dict[str, list[dict[str, Any]]] = {}

    def use(self, way: str) -> None:
        """The layers run so from now on. What is compiled once stays compiled."""
        layers = self.policy.causal_lm.model.layers
        names = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func")
        for layer in layers:
            for name in names:
                layer.__dict__.pop(name, None)
        if way not in self._layers:
            prepare_layers(self.policy.causal_lm, self.options[way].layers, self.precision.itemsize)
            self._layers[way] = [{name: layer.__dict__[name] for name in names if name in layer.__dict__} for layer in layers]
        for layer, state in zip(layers, self._layers[way], strict=True):
            layer.__dict__.update(state)

    def step(self, figures: Figures, marked: bool = False) -> None:
        """Scores the mini-batch and makes an update of it."""
        with watched(self.actor) if marked else nullcontext() as marks:
            seconds, [scored] = self._timed(lambda: self.actor.score([self.batch], self.stage))
        (figures.score_phases if marked else figures.score).append(marks.seconds() if marked else seconds)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with watched(self.actor) if marked else nullcontext() as marks:
            seconds, result = self._timed(lambda: self.actor.update(scored, self.stage))
        (figures.update_phases if marked else figures.update).append(marks.seconds() if marked else seconds)
        if self.device.type == "cuda":
            figures.allocated = max(figures.allocated, torch.cuda.max_memory_allocated(self.device))
            figures.reserved = max(figures.reserved, torch.cuda.max_memory_reserved(self.device))
        if result.skipped:
            raise RuntimeError(f"the gradient's norm is {result.grad_norm}: what was measured is no update")
        figures.grad_norm = result.grad_norm

    def gemm_rate(self) -> float:
        shapes = layer_shapes(self.policy.causal_lm)
        return gemm_rate(shapes, self.stage.actor.tokens_per_micro_batch, self.precision, self.device)

    def measure(self, rounds: int, marked_rounds: int, note: Any) -> tuple[dict[str, Figures], list[float]]:
        """(figures by way, GEMM rates). A first round warms up; the last ones have marks. Raises InputError where memory runs
        out."""
        figures = {name: Figures() for name in self._ways}
        rates = []
        for number, order in enumerate(orders(list(self._ways), 1 + rounds + marked_rounds)):
            for name in order:
                note(f"round {number} of {rounds + marked_rounds}: {name}")
                self.use(name)
                try:
                    self.step(Figures() if number == 0 else figures[name], marked=number > rounds)
                except torch.OutOfMemoryError as error:
                    raise InputError(f"{name}: {str(error).partition('.')[0]}; shorten --context or keep less") from None
                rates += [self.gemm_rate()] if number else []
        return figures, rates

    def _timed(self, call: Any) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = call()
        synchronize(self.device)
        return time.perf_counter() - start, result


def random_policy(path: Path, mesh: DeviceMesh, options: PolicyOptions, device: torch.device, seed: int) -> Policy:
    """As transformers begins a model: matrices N(0, 0.02²), norms 1, biases 0; each shard filled where it lies."""
    policy = empty_policy(path, mesh, options)
    allocate(policy, device)
    generator = torch.Generator(device).manual_seed(seed + mesh.get_rank())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.dim() > 1:
                local.normal_(0.0, 0.02, generator=generator)
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
    return policy
