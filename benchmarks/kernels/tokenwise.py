"""The operations of `cases.TOKENWISE`: each as our kernel computes it and as plain PyTorch does, which in fp64 is what is right.

Both are functions of (inputs, logprob_T) and give a loss that is differentiable by logprob_T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.kernels.contender import policy_loss_of
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW, Inputs
from kernels.clipped_policy_loss import clipped_policy_loss


@dataclass(frozen=True, slots=True)
class Loss:
    ours: Callable[[Inputs, Tensor], Tensor]
    definition: Callable[[Inputs, Tensor], Tensor]
    """In the dtype of logprob_T."""


def clipped(inputs: Inputs, logprob_T: Tensor) -> Tensor:
    return clipped_policy_loss(
        logprob_T, inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T, clip_low=CLIP_LOW, clip_high=CLIP_HIGH
    ).loss


TOKENWISE_LOSSES = {
    "clipped_policy_loss": Loss(clipped, lambda inputs, logprob_T: policy_loss_of(inputs, logprob_T, None)),
}
