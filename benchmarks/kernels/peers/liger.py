"""Liger-Kernel (linkedin/Liger-Kernel): the loss from logits, the head, and the chunked loss from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import BOTH, BOTH_INPLACE, Case
from benchmarks.kernels.contender import Function, Gradient, Outputs, Prepared
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW, Inputs
from benchmarks.kernels.peers.base import HeadPeer, Peer


class LigerGrpoLogits(Peer):
    """Sequences of L tokens with one row of logits more, [B, L + 1, V], and an advantage for each sequence."""

    name = "Liger triton_grpo_loss"
    operations = ("policy_loss_from_logits",)
    modes = (BOTH, BOTH_INPLACE)
    package, distribution = "liger_kernel", "liger-kernel"

    def gradient(self, case: Case) -> Gradient:  # noqa: ARG002
        return Gradient.POLICY

    def working_bytes(self, case: Case) -> int:
        return 3 * case.tokens * case.vocabulary * case.item_bytes

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        batch, length = inputs.sequences, case.tokens // inputs.sequences
        source = inputs.logits_TV.view(batch, length, -1)
        padded = source.new_zeros(batch, length + 1, case.vocabulary)
        padded[:, :-1] = source
        per_sequence = [tensor.view(batch, length) for tensor in (inputs.old_logprob_T, inputs.labels_T, inputs.advantage_T)]
        old_logprob, labels, advantage = per_sequence
        inplace = case.mode == BOTH_INPLACE

        def run() -> Outputs:
            logits = padded.detach().requires_grad_()
            loss, _ = triton_grpo_loss(
                logits, old_logprob, None, labels, advantage[:, 0].contiguous(), None, temperature=1.0, beta=0.0,
                eps_low=CLIP_LOW, eps_high=CLIP_HIGH, inplace=inplace, loss_type="dapo", reduce=True,
            )  # fmt: skip
            (d_logits,) = torch.autograd.grad(loss, logits)
            return Outputs(loss=loss.detach(), d_logits_TV=d_logits[:, :-1])

        return Prepared(run, lambda: padded[:, :-1].copy_(source) if inplace else None, (padded,))


class LigerHead(HeadPeer):
    """Its kernel for Hopper where CuTe is installed; `name` says otherwise in `LigerHeadFallback`."""

    name = "Liger FusedLinearScaledCrossEntropy"
    package, distribution = "liger_kernel", "liger-kernel"

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:  # noqa: ARG002
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Fused

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            nll, entropy = Fused.apply(hidden, weight, inputs.labels_T, 1.0, -100, 1, True)
            return -nll, entropy

        return run


class LigerHeadFallback(HeadPeer):
    name = "Liger FusedLinearScaledCrossEntropy, without CuTe"
    package, distribution = "liger_kernel", "liger-kernel"
    needs_cuda = False

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:  # noqa: ARG002
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction as Fallback

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            nll, entropy = Fallback.apply(hidden, weight, inputs.labels_T, 1.0, -100, True)
            return -nll, entropy

        return run


class LigerGrpoLinear(Peer):
    name = "Liger FusedLinearGRPOLoss"
    operations = ("linear_policy_loss",)
    modes = (BOTH,)
    package, distribution = "liger_kernel", "liger-kernel"
    needs_cuda = False

    def gradient(self, case: Case) -> Gradient:  # noqa: ARG002
        return Gradient.POLICY

    def function(self, case: Case, inputs: Inputs) -> Function:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        batch, length = inputs.sequences, case.tokens // inputs.sequences
        module = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="dapo", temperature=1.0,
            compiled=inputs.device.type == "cuda",
        )  # fmt: skip
        labels, old_logprob = inputs.labels_T.view(batch, length), inputs.old_logprob_T.view(batch, length)
        advantage = inputs.advantage_T.view(batch, length)[:, 0].contiguous()
        mask = torch.ones_like(old_logprob)

        def run(hidden: Tensor, weight: Tensor) -> Outputs:
            loss, *_ = module(hidden.view(batch, length, -1), weight, labels, mask, advantage, old_per_token_logps=old_logprob)
            return Outputs(loss=loss)

        return run
