"""Floating-point operations of a step and what they are compared with.

forward F, head H    `trainer.planner.cost`: 2 · weights · tokens of the layers' matrices and causal attention; one GEMM of
                     the output head over the response tokens
model FLOPs          of an update 3 · (F + H), of a step (score and update) 4 · (F + H): what MFU counts, nothing twice
done                 and what checkpointed layers compute again (`trainer.planner.cost.computed_again`): what HFU counts
MFU, HFU             FLOPs / (seconds · ranks · the GEMM rate), the rate measured in the same rounds: the products of one
                     layer's matrices, forward, on as many tokens as a micro-batch has, in the dtype that computes
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

GEMM_SECONDS = {"cpu": 0.4, "cuda": 0.25}
"""At least so long is multiplied for one figure of the rate."""


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of all ranks together. forward: F; head: H; again: what the update computes a second time."""

    forward: float
    head: float
    again: float = 0.0

    @property
    def model_update(self) -> float:
        return 3 * (self.forward + self.head)

    @property
    def model_step(self) -> float:
        return 4 * (self.forward + self.head)

    @property
    def done_update(self) -> float:
        return self.model_update + self.again


def utilisation(flops: float, seconds: float, ranks: int, rate: float) -> float:
    """Share of `rate`, operations a second of one rank."""
    return flops / (seconds * ranks * rate)


def layer_shapes(causal_lm: nn.Module) -> list[tuple[int, int]]:
    """(outputs, inputs) of one decoder layer's matrices."""
    return [tuple(parameter.shape) for parameter in causal_lm.model.layers[0].parameters() if parameter.dim() == 2]


def gemm_rate(shapes: list[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of those matrices' products with `tokens` rows, one after the other, again and again."""
    random = {"dtype": dtype, "device": device}
    weights = [torch.randn(shape, **random) for shape in shapes]
    inputs = {width: torch.randn(tokens, width, **random) for _, width in shapes}
    multiply_all(weights, inputs)
    once = timed(device, 1, weights, inputs)
    turns = max(1, round(GEMM_SECONDS[device.type] / once))
    seconds = timed(device, turns, weights, inputs)
    return turns * sum(2 * tokens * outputs * width for outputs, width in shapes) / seconds


def timed(device: torch.device, turns: int, weights: list[Tensor], inputs: dict[int, Tensor]) -> float:
    """Seconds."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(turns):
        multiply_all(weights, inputs)
    synchronize(device)
    return time.perf_counter() - start


def multiply_all(weights: list[Tensor], inputs: dict[int, Tensor]) -> None:
    for weight in weights:
        functional.linear(inputs[weight.shape[1]], weight)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
