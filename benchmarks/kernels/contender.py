"""What a contender is: who it is, what it computes of a case, how it is called; and the one driver that calls all alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum

import torch
from torch import Tensor

from benchmarks.kernels.cases import BACKWARD, BOTH, BOTH_INPLACE, FORWARD, Case
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW, Inputs
from kernels import reference


class Gradient(Enum):
    """What a contender's gradient is the gradient of. Its value is the table's text."""

    NONE = "no gradient"
    PAIR = "gradient by logprob and entropy"
    LOGPROB = "gradient by logprob alone"
    NLL = "gradient of the mean loss"
    POLICY_ENTROPY = "gradient of policy loss and entropy"
    POLICY = "gradient of the policy loss"
    LOSS = "gradient of the loss"


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one call returned; None for what it does not compute."""

    logprob_T: Tensor | None = None
    entropy_T: Tensor | None = None
    loss: Tensor | None = None
    d_logits_TV: Tensor | None = None
    d_hidden_TD: Tensor | None = None
    d_weight_VD: Tensor | None = None
    d_logprob_T: Tensor | None = None
    value: object = None
    """Of an operation that returns no tensor."""

    def tensors(self) -> list[Tensor]:
        return [value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)]


@dataclass(frozen=True, slots=True)
class Prepared:
    """run: the timed call. before: puts the input back, not timed. buffers: inputs that this call owns besides the case's."""

    run: Callable[[], Outputs]
    before: Callable[[], None] | None = None
    buffers: tuple[Tensor, ...] = ()


Function = Callable[..., Outputs]
"""Takes the case's leaves (`Inputs.leaves`) and returns what it computes of them, differentiable where it has a gradient."""


class Contender:
    """One implementation. Subclasses set the attributes and `function`; most need no more."""

    name: str
    kind: str = "peer"
    """ "keju", "torch" or "peer"."""
    operations: tuple[str, ...]
    modes: tuple[str, ...] = (FORWARD, BACKWARD, BOTH)
    distribution: str | None = None
    """Whose version it is; torch's where None."""

    def offers(self, case: Case) -> bool:
        """Whether this is its operation at all; what it does not offer is not listed."""
        return case.operation in self.operations and case.mode in self.modes

    def version(self) -> str:
        from importlib import metadata

        try:
            return metadata.version(self.distribution) if self.distribution else torch.__version__
        except metadata.PackageNotFoundError:
            return "not installed"

    def unavailable(self, case: Case, device: torch.device) -> str | None:  # noqa: ARG002
        """Why it cannot run this case here; None where it can. Must be cheap, and never raise."""
        return None

    def gradient(self, case: Case) -> Gradient:
        if not case.with_gradient:
            return Gradient.NONE
        if case.is_tokenwise:
            return Gradient.LOSS
        return Gradient.POLICY_ENTROPY if "policy" in case.operation else Gradient.PAIR

    def values(self, case: Case) -> str:
        return "loss" if "policy" in case.operation or case.is_tokenwise else "logprob, entropy"

    def returns(self, case: Case) -> str:
        return f"{self.values(case)}; {self.gradient(case).value}"

    def working_bytes(self, case: Case) -> int:
        """A guess, from above, of what a call needs besides inputs and outputs, so that a case that cannot fit is not begun."""
        return 2 * case.tokens * case.vocabulary * case.item_bytes

    def function(self, case: Case, inputs: Inputs) -> Function:
        raise NotImplementedError

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        return drive(case, inputs, self.function(case, inputs), self.gradient(case))


def drive(
    case: Case, inputs: Inputs, function: Function, gradient: Gradient, mark: Callable[[list[Tensor]], None] | None = None
) -> Prepared:
    """The case's mode around a function of its leaves. mark: what a contender does to fresh leaves before they are used."""
    if case.mode == FORWARD:
        return Prepared(torch.no_grad()(functools.partial(function, *inputs.leaves)))
    source = inputs.leaves
    before = None
    if case.mode == BOTH_INPLACE:
        source = tuple(leaf.clone() for leaf in inputs.leaves)
        before = functools.partial(_restore, source, inputs.leaves)

    def fresh() -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in source]
        if mark is not None:
            mark(leaves)
        return leaves

    if case.mode == BACKWARD:
        kept = fresh()
        outputs = function(*kept)
        return Prepared(lambda: _with_gradients(case, inputs, outputs, kept, gradient, retain=True))

    def both() -> Outputs:
        leaves = fresh()
        return _with_gradients(case, inputs, function(*leaves), leaves, gradient, retain=False)

    return Prepared(both, before, source if before else ())


def _restore(buffers: tuple[Tensor, ...], originals: tuple[Tensor, ...]) -> None:
    for buffer, original in zip(buffers, originals, strict=True):
        buffer.copy_(original)


def _with_gradients(
    case: Case, inputs: Inputs, outputs: Outputs, leaves: list[Tensor], gradient: Gradient, *, retain: bool
) -> Outputs:
    if outputs.loss is not None:
        found = torch.autograd.grad(outputs.loss, leaves, retain_graph=retain)
    elif gradient is Gradient.LOGPROB:
        found = torch.autograd.grad(outputs.logprob_T, leaves, inputs.d_logprob_T, retain_graph=retain)
    else:
        arriving = [
            d.to(out.dtype) for d, out in ((inputs.d_logprob_T, outputs.logprob_T), (inputs.d_entropy_T, outputs.entropy_T))
        ]
        found = torch.autograd.grad([outputs.logprob_T, outputs.entropy_T], leaves, arriving, retain_graph=retain)
    names = ("d_hidden_TD", "d_weight_VD") if case.is_linear else ("d_logits_TV",) if case.takes_logits else ("d_logprob_T",)
    values = {
        name: value.detach() for name in ("logprob_T", "entropy_T", "loss") if (value := getattr(outputs, name)) is not None
    }
    return Outputs(**values, **dict(zip(names, found, strict=True)))


def policy_loss_of(inputs: Inputs, logprob_T: Tensor, entropy_T: Tensor | None) -> Tensor:
    """The reference's clipped loss of a log-probability, and the entropy term where there is an entropy: what a trainer with
    that contender's head would compute after it."""
    loss = reference.clipped_policy_loss(
        logprob_T, inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T, clip_low=CLIP_LOW, clip_high=CLIP_HIGH
    ).loss
    return loss if entropy_T is None else loss + (inputs.entropy_weight * entropy_T).sum()
