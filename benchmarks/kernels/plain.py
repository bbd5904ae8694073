"""PyTorch itself as a contender: the code that one would write, eagerly and compiled, and its own fused linear cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.cases import BOTH, FORWARD, OPERATIONS, Case
from benchmarks.kernels.contender import Contender, Function, Gradient, Outputs, policy_loss_of
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.tokenwise import TOKENWISE_LOSSES


def logprob_entropy(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, gather and the entropy, in fp32."""
    log_p_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    logprob_T = log_p_TV.gather(1, labels_T.unsqueeze(1)).squeeze(1)
    return logprob_T, -(log_p_TV.exp() * log_p_TV).sum(-1)


class Eager(Contender):
    name = "torch eager"
    kind = "torch"
    operations = tuple(name for name in OPERATIONS if name != "repetition")

    def values(self, case: Case) -> str:
        return "loss, statistics" if case.operation == "clipped_policy_loss" else super().values(case)

    def working_bytes(self, case: Case) -> int:
        # Logits in their dtype, then in fp32: log_softmax, its exponential, their product, and the gradients of two of these.
        return 28 * case.tokens * case.vocabulary

    def function(self, case: Case, inputs: Inputs) -> Function:
        if case.is_tokenwise:
            return lambda logprob: Outputs(loss=TOKENWISE_LOSSES[case.operation].definition(inputs, logprob))
        linear, with_policy = case.is_linear, "policy" in case.operation

        def run(*leaves: Tensor) -> Outputs:
            logits = functional.linear(*leaves) if linear else leaves[0]
            logprob, entropy = logprob_entropy(logits, inputs.labels_T)
            return Outputs(logprob, entropy, policy_loss_of(inputs, logprob, entropy) if with_policy else None)

        return run


class Compiled(Eager):
    """torch.compile of the same code, for this very shape."""

    name = "torch.compile"
    modes = (FORWARD, BOTH)  # a compiled backward gives its buffers away, so that it cannot be called alone again

    def values(self, case: Case) -> str:
        return "loss" if "policy" in case.operation else super().values(case)

    def working_bytes(self, case: Case) -> int:
        return 12 * case.tokens * case.vocabulary

    def function(self, case: Case, inputs: Inputs) -> Function:
        plain = super().function(case, inputs)

        def bare(*leaves: Tensor) -> tuple:
            outputs = plain(*leaves)
            return outputs.logprob_T, outputs.entropy_T, outputs.loss

        compiled = torch.compile(bare, dynamic=False, fullgraph=True)
        return lambda *leaves: Outputs(*compiled(*leaves))


class LinearCrossEntropy(Contender):
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13): the mean negative log-probability, nothing else."""

    name = "F.linear_cross_entropy"
    kind = "torch"
    operations = ("linear_logprob_entropy", "linear_policy_loss")
    modes = (FORWARD, BOTH)

    def unavailable(self, case: Case, device: torch.device) -> str | None:  # noqa: ARG002
        if not hasattr(functional, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        return None

    def gradient(self, case: Case) -> Gradient:
        return Gradient.NLL if case.with_gradient else Gradient.NONE

    def values(self, case: Case) -> str:  # noqa: ARG002
        return "mean loss only"

    def function(self, case: Case, inputs: Inputs) -> Function:  # noqa: ARG002
        return lambda hidden, weight: Outputs(
            loss=functional.linear_cross_entropy(hidden, weight, inputs.labels_T, reduction="mean")
        )


def contenders() -> list[Contender]:
    return [Eager(), Compiled(), LinearCrossEntropy()]
