"""verl's linear_cross_entropy, Apple's cut-cross-entropy and quack's chunked_linear_cross_entropy: one kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import BOTH, Case
from benchmarks.kernels.contender import Function, Gradient, Outputs
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.peers.base import HeadPeer, Peer
from benchmarks.kernels.peers.loading import load


class Verl(HeadPeer):
    """Loaded by path: `import verl` wants Ray. Three names of verl.utils.device are stubbed, which tell it the device."""

    name = "verl linear_cross_entropy"
    package = distribution = "verl"

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        reason = super().unavailable(case, device)
        if reason is None and device.type != "cuda":
            return "needs a CUDA device"  # it asserts one even where kernels are interpreted
        return reason or ("needs a hidden size that is a multiple of 128" if case.hidden % 128 else None)

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:  # noqa: ARG002
        cuda = inputs.device.type == "cuda"
        device = {
            "is_cuda_available": cuda,
            "get_device_name": lambda: inputs.device.type,
            "get_device_capability": lambda *_: torch.cuda.get_device_capability() if cuda else (0, 0),
            "get_torch_device": lambda: torch.cuda,
        }
        stubs = {"verl": {"__path__": []}, "verl.utils": {"__path__": []}, "verl.utils.device": device}
        load("verl", "utils.kernel.kernels", stubs)
        run = load("verl", "utils.kernel.linear_cross_entropy").linear_cross_entropy
        return lambda hidden, weight: tuple(run(hidden, weight, inputs.labels_T, 1.0))


class CutCrossEntropy(HeadPeer):
    """As its users call it: blocks of the gradient below an eps are left out."""

    name = "cut-cross-entropy"
    package, distribution = "cut_cross_entropy", "cut-cross-entropy"
    has_entropy = False
    filter_eps: str | None = "high"

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        # Its autotuner asks for the device's capability even where kernels are interpreted.
        return super().unavailable(case, device) or (None if device.type == "cuda" else "needs a CUDA device")

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:  # noqa: ARG002
        from cut_cross_entropy import linear_cross_entropy

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            nll = linear_cross_entropy(hidden, weight, inputs.labels_T, reduction="none", filter_eps=self.filter_eps)
            return -nll.float(), None

        return run


class CutCrossEntropyWhole(CutCrossEntropy):
    """The whole gradient."""

    name = "cut-cross-entropy, unfiltered"
    filter_eps = None


class Quack(Peer):
    name = "quack chunked_linear_cross_entropy"
    operations = ("linear_logprob_entropy", "linear_policy_loss")
    modes = (BOTH,)
    package, distribution = "quack", "quack-kernels"

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        reason = super().unavailable(case, device)
        return reason or ("needs a CUDA device" if device.type != "cuda" else None)  # CuTe has no interpreter

    def values(self, case: Case) -> str:  # noqa: ARG002
        return "mean loss only"

    def gradient(self, case: Case) -> Gradient:  # noqa: ARG002
        return Gradient.NLL

    def function(self, case: Case, inputs: Inputs) -> Function:  # noqa: ARG002
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda hidden, weight: Outputs(loss=chunked_linear_cross_entropy(hidden, weight, inputs.labels_T))
