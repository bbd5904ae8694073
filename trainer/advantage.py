"""Advantage of each output of a group: a pure function of the group's rewards, in fp64.

    grpo      Â_i = (R_i - μ) / (std(R) + 1e-6)                        (GRPO, arXiv 2402.03300)
    centered  Â_i = R_i - μ
    pshw      Â_i = (R_i - μ) · D(q),  D(q) = α μ + 1.256,  α = -0.256  (Policy-Specific Hardness Weighting, arXiv 2506.18330)

With R in {1, -1}, D is 1 for a question that the current policy always gets right and 1.512 for one it always gets wrong: the
harder a question is for the policy of the moment, the larger its weight.

ADVANTAGES is the one place that names them: a configuration accepts its keys, and tests take each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

STD_EPSILON = 1e-6


class Objective(Protocol):
    """What is read here of `trainer.config.ObjectiveConfig`, which imports this module."""

    advantage: str
    std_correction: int
    pshw_alpha: float
    pshw_base: float


def advantages(rewards: Sequence[int], objective: Objective) -> list[float]:
    """One advantage an output, the same for all its tokens. rewards: the group's R_i, at least two."""
    mean = math.fsum(rewards) / len(rewards)
    return ADVANTAGES[objective.advantage]([reward - mean for reward in rewards], mean, objective)


def grpo(centered: list[float], mean: float, objective: Objective) -> list[float]:  # noqa: ARG001 - as all ADVANTAGES
    std = math.sqrt(math.fsum(value * value for value in centered) / (len(centered) - objective.std_correction))
    return [value / (std + STD_EPSILON) for value in centered]


def pshw(centered: list[float], mean: float, objective: Objective) -> list[float]:
    hardness = objective.pshw_alpha * mean + objective.pshw_base
    return [value * hardness for value in centered]


ADVANTAGES: dict[str, Callable[[list[float], float, Objective], list[float]]] = {
    "grpo": grpo,
    "centered": lambda centered, *_: centered,
    "pshw": pshw,
}
"""Name → function of (R_i - μ of each output, μ, the objective)."""
