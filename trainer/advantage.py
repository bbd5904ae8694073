"""Advantage of each output of a group: a pure function of the group's rewards, in fp64.

    grpo      Â_i = (R_i - μ) / (std(R) + 1e-6)                        (GRPO, arXiv 2402.03300)
    centered  Â_i = R_i - μ
    pshw      Â_i = (R_i - μ) · D(q),  D(q) = α μ + 1.256,  α = -0.256  (Policy-Specific Hardness Weighting, arXiv 2506.18330)

With R in {1, -1}, D is 1 for a question that the current policy always gets right and 1.512 for one it always gets wrong: the
harder a question is for the policy of the moment, the larger its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.config import ObjectiveConfig

STD_EPSILON = 1e-6


def advantages(rewards: Sequence[int], objective: ObjectiveConfig) -> list[float]:
    """One advantage an output, the same for all its tokens. rewards: the group's R_i, at least two."""
    size = len(rewards)
    mean = math.fsum(rewards) / size
    centered = [reward - mean for reward in rewards]
    if objective.advantage == "centered":
        return centered
    if objective.advantage == "pshw":
        hardness = objective.pshw_alpha * mean + objective.pshw_base
        return [value * hardness for value in centered]
    std = math.sqrt(math.fsum(value * value for value in centered) / (size - objective.std_correction))
    return [value / (std + STD_EPSILON) for value in centered]
