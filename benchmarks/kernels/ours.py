"""Keju's own kernels as contenders: the default choice under the name "keju", every other backend that runs here beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.cases import BOTH, BOTH_INPLACE, FORWARD, OPERATIONS, Case
from benchmarks.kernels.contender import Contender, Function, Outputs, Prepared, drive
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW, Inputs
from benchmarks.kernels.tokenwise import TOKENWISE_LOSSES, clipped
from kernels import backend
from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLossInputs, linear_policy_loss
from kernels.logprob_entropy import logprob_entropy

PLACES: dict[str, tuple[backend.Backend, ...]] = {"cuda": ("triton", "cuda", "reference"), "cpu": ("native", "reference")}

DEFINED = {"cpu": 1 << 22, "cuda": 1 << 30}
"""Most logits for which kernels/reference.py is timed."""


class Keju(Contender):
    """The public functions under one backend, or under the one that they choose themselves."""

    kind = "keju"
    operations = tuple(OPERATIONS)
    modes = (FORWARD, "backward", BOTH, BOTH_INPLACE)

    def __init__(self, forced: str | None = None) -> None:
        self._forced = forced
        self.name = "keju" if forced is None else f"keju, {forced}"

    def version(self) -> str:
        return kernels.__version__

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        if self._forced == "reference" and case.tokens * case.vocabulary > DEFINED[device.type]:
            return f"the definition is not timed beyond {DEFINED[device.type]:,} logits: it takes up to a hundred times as long"
        return None

    def values(self, case: Case) -> str:
        if case.operation == "repetition":
            return "tandem repeat, share of n-grams"
        return {"linear_policy_loss": "loss, logprob, entropy, statistics", "clipped_policy_loss": "loss, statistics"}.get(
            case.operation, super().values(case)
        )

    def working_bytes(self, case: Case) -> int:
        if self._forced == "reference" or not case.is_linear:
            return (32 if self._forced == "reference" else 0) * case.tokens * case.vocabulary
        return 3 << 30

    def function(self, case: Case, inputs: Inputs) -> Function:
        if case.is_tokenwise:
            return lambda logprob: Outputs(loss=TOKENWISE_LOSSES[case.operation].ours(inputs, logprob))
        return {
            "logprob_entropy": self._logprob_entropy,
            "linear_logprob_entropy": self._linear_logprob_entropy,
            "linear_policy_loss": self._linear_policy_loss,
            "policy_loss_from_logits": self._policy_loss_from_logits,
        }[case.operation](case, inputs)

    def mark(self, leaves: list[Tensor]) -> None:
        """Nothing: the gradients come in the leaves' own dtypes."""

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        if case.operation == "repetition":
            return Prepared(self._under_backend(_worst_repetition(inputs)))
        with_backend = self._under_backend(
            lambda: drive(case, inputs, self.function(case, inputs), self.gradient(case), self.mark)
        )
        prepared = with_backend()
        return replace(prepared, run=self._under_backend(prepared.run))

    def _under_backend(self, run: Callable) -> Callable:
        """Backward included, which looks at the choice again."""
        if self._forced is None:
            return run

        def forced():
            with backend.use(self._forced):
                return run()

        return forced

    @staticmethod
    def _logprob_entropy(case: Case, inputs: Inputs) -> Function:
        inplace = case.mode == BOTH_INPLACE
        return lambda logits: Outputs(*logprob_entropy(logits, inputs.labels_T, inplace_backward=inplace))

    @staticmethod
    def _linear_logprob_entropy(_case: Case, inputs: Inputs) -> Function:
        return lambda hidden, weight: Outputs(*linear_logprob_entropy(hidden, weight, inputs.labels_T))

    @staticmethod
    def _policy_loss_from_logits(case: Case, inputs: Inputs) -> Function:
        inplace = case.mode == BOTH_INPLACE

        def run(logits: Tensor) -> Outputs:
            logprob, entropy = logprob_entropy(logits, inputs.labels_T, inplace_backward=inplace)
            return Outputs(logprob, entropy, clipped(inputs, logprob) + inputs.entropy_weight * entropy.sum())

        return run

    @staticmethod
    def _linear_policy_loss(_case: Case, inputs: Inputs) -> Function:
        arguments = PolicyLossInputs(
            labels_T=inputs.labels_T,
            old_logprob_T=inputs.old_logprob_T,
            advantage_T=inputs.advantage_T,
            weight_T=inputs.weight_T,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            entropy_weight=inputs.entropy_weight,
        )

        def run(hidden: Tensor, weight: Tensor) -> Outputs:
            result = linear_policy_loss(hidden, weight, arguments)
            return Outputs(result.logprob_T, result.entropy_T, result.loss)

        return run


class KejuWideGradient(Keju):
    """d_weight in fp32 for a bf16 weight: the sum over tokens as it is, for an optimizer or a reduction that takes fp32."""

    operations = ("linear_policy_loss", "linear_logprob_entropy")
    modes = (BOTH,)

    def __init__(self) -> None:
        super().__init__()
        self.name = "keju, fp32 d_weight"

    def unavailable(self, case: Case, device: torch.device) -> str | None:  # noqa: ARG002
        if case.dtype == "float32":
            return "the weight's gradient is fp32 already"
        return None if hasattr(Tensor, "grad_dtype") else f"torch {torch.__version__} has no Tensor.grad_dtype"

    def mark(self, leaves: list[Tensor]) -> None:
        leaves[1].grad_dtype = torch.float32


def contenders(device: torch.device) -> list[Contender]:
    """The default choice, and each other backend that has something for this kind of device."""
    others = [name for name in PLACES[device.type] if name != backend.choose(device.type, "float32")]
    return [Keju(), KejuWideGradient(), *(Keju(name) for name in others)]


def chosen(case: Case, device: torch.device) -> str:
    """The backend behind the plain name "keju"."""
    if case.operation == "repetition":
        return "native" if backend.has_native() else "NumPy"
    return backend.choose(device.type, case.dtype)


def _worst_repetition(inputs: Inputs) -> Callable[[], Outputs]:
    """The kind of text that takes longest is what is timed."""
    from rollout.reward.repetition import measure_repetition

    def seconds(name: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            measure_repetition(inputs.token_ids[name])
            times.append(time.perf_counter() - start)
        return sorted(times)[2]

    worst = max(inputs.token_ids, key=seconds)
    return lambda: Outputs(value=measure_repetition(inputs.token_ids[worst]))
