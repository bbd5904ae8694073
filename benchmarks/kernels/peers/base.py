"""What peers have in common: they may be missing, most need a CUDA device, most give a log-probability that a loss follows."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import BOTH, FORWARD, Case
from benchmarks.kernels.contender import Contender, Function, Gradient, Outputs, policy_loss_of
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.peers.loading import installed


class Peer(Contender):
    kind = "peer"
    package: str
    """What is imported."""
    needs_cuda = True

    def unavailable(self, case: Case, device: torch.device) -> str | None:  # noqa: ARG002
        if not installed(self.package):
            return "not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "needs a CUDA device" if self.needs_cuda and device.type != "cuda" and not interpreted else None


class HeadPeer(Peer):
    """Log-probability, and entropy where it has one, from hidden states and the output weight.

    For linear_policy_loss the reference's clipped loss follows in PyTorch, as a trainer with this head has it.
    """

    operations = ("linear_logprob_entropy", "linear_policy_loss")
    modes = (FORWARD, BOTH)
    has_entropy = True

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
        raise NotImplementedError

    def values(self, case: Case) -> str:
        given = "logprob, entropy" if self.has_entropy else "logprob alone"
        return f"{given}; the loss in PyTorch after it" if "policy" in case.operation else given

    def gradient(self, case: Case) -> Gradient:
        if not case.with_gradient:
            return Gradient.NONE
        if "policy" in case.operation:
            return Gradient.POLICY_ENTROPY if self.has_entropy else Gradient.POLICY
        return Gradient.PAIR if self.has_entropy else Gradient.LOGPROB

    def function(self, case: Case, inputs: Inputs) -> Function:
        head = self.head(case, inputs)
        with_policy = "policy" in case.operation

        def run(hidden: Tensor, weight: Tensor) -> Outputs:
            logprob, entropy = head(hidden, weight)
            return Outputs(logprob, entropy, policy_loss_of(inputs, logprob, entropy) if with_policy else None)

        return run
