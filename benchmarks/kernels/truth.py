"""How wrong a contender is: its outputs against kernels/reference.py in fp64, on a sample of rows where the tables are large.

Rows do not depend on each other, so a sample of them is exact for logprob, entropy, d_logits and d_hidden. d_weight sums over all
tokens: all rows are computed, and a sample of the vocabulary is compared, labels among it.

    logprob, entropy     largest absolute difference, nats
    d_…, loss            ‖difference‖ / ‖fp64‖
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels import plain
from benchmarks.kernels.contender import Gradient, Outputs
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW, Inputs, row_chunks
from benchmarks.kernels.tokenwise import TOKENWISE_LOSSES
from kernels import reference

ROWS = {"cpu": 64, "cuda": 512}
UNITS = 1024
MOST_OPERATIONS = {"cpu": 4e11, "cuda": 3e13}
"""Largest fp64 GEMM for the sake of d_weight: beyond it only rows are compared."""
TOLERANCES = {
    "bfloat16": {"logprob": 0.25, "entropy": 0.25, "gradient": 0.1},
    "float32": {"logprob": 5e-3, "entropy": 5e-3, "gradient": 5e-3},
}
"""Beyond these a contender does not compute this operation at all, and is not timed. A bf16 logit of 22 is known to 0.06."""


@dataclass(frozen=True)
class Sample:
    """Which rows and which columns of the vocabulary are compared."""

    rows: Tensor
    units: Tensor


@dataclass(frozen=True)
class Exact:
    """fp64. Row quantities of the sample's rows, d_weight of its units; None where the case has none."""

    logprob_R: Tensor | None = None
    entropy_R: Tensor | None = None
    loss: Tensor | None = None
    d_logits_RV: Tensor | None = None
    d_hidden_RD: Tensor | None = None
    d_weight_UD: Tensor | None = None
    d_logprob_T: Tensor | None = None


class Truth:
    """The exact results of one set of inputs, each computed when first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.sample = _sample(inputs)
        self._known: dict[Gradient, Exact] = {}

    def of(self, gradient: Gradient) -> Exact:
        if gradient not in self._known:
            one = self.inputs.case.is_tokenwise
            self._known[gradient] = _exact_tokenwise(self.inputs) if one else _exact(self.inputs, self.sample, gradient)
        return self._known[gradient]

    def errors(self, outputs: Outputs, gradient: Gradient) -> dict[str, float]:
        """Errors by name of what the contender returned; NaN anywhere gives NaN."""
        if self.inputs.case.operation == "repetition":
            return {}
        exact, rows = self.of(gradient), self.sample.rows
        found = {}
        for name, mine, right in (
            ("logprob", outputs.logprob_T, exact.logprob_R),
            ("entropy", outputs.entropy_T, exact.entropy_R),
        ):
            if mine is not None and right is not None:
                found[name] = (mine.reshape(-1)[rows].double() - right).abs().max().item()
        for name, mine, right, of_it in (
            ("d_logits", outputs.d_logits_TV, exact.d_logits_RV, rows),
            ("d_hidden", outputs.d_hidden_TD, exact.d_hidden_RD, rows),
            ("d_weight", outputs.d_weight_VD, exact.d_weight_UD, self.sample.units),
            ("d_logprob", outputs.d_logprob_T, exact.d_logprob_T, None),
            ("loss", outputs.loss, None if outputs.loss is None else self._loss(gradient), None),
        ):
            if mine is not None and right is not None:
                part = mine if of_it is None else mine.reshape(-1, right.shape[-1])[of_it]
                found[name] = relative(part, right)
        return found

    def _loss(self, gradient: Gradient) -> Tensor | None:
        """A forward without gradient that returns a loss alone returns the mean loss."""
        return self.of(Gradient.NLL if gradient is Gradient.NONE and self.inputs.case.is_linear else gradient).loss

    def fp32_errors(self) -> dict[str, float]:
        """PyTorch's own fp32 computation of the sampled rows, whatever the inputs' dtype."""
        logits = self.inputs.logits_of(self.sample.rows, torch.float32)
        logprob, entropy = plain.logprob_entropy(logits, self.inputs.labels_T[self.sample.rows])
        exact = self.of(Gradient.NONE)
        pairs = (("logprob", logprob, exact.logprob_R), ("entropy", entropy, exact.entropy_R))
        return {name: (mine.double() - right).abs().max().item() for name, mine, right in pairs}


def relative(mine: Tensor, right: Tensor) -> float:
    difference = torch.linalg.vector_norm(mine.double() - right.double())
    return (difference / torch.linalg.vector_norm(right.double()).clamp_min(1e-300)).item()


def wrong(errors: dict[str, float], dtype: str) -> str | None:
    """Why these errors are no rounding; None where they may be."""
    allowed = TOLERANCES[dtype]
    for name, error in errors.items():
        limit = allowed.get(name, allowed["gradient"])
        if not error <= limit:
            return f"wrong: {name} is off by {error:.2g}"
    return None


def _sample(inputs: Inputs) -> Sample:
    case = inputs.case
    random = torch.Generator().manual_seed(1)
    rows = torch.randperm(case.tokens, generator=random)[: ROWS[inputs.device.type]].sort().values
    drawn = torch.randint(max(case.vocabulary, 1), (UNITS // 2,), generator=random)
    labels = inputs.labels_T[: UNITS // 2].cpu()
    return Sample(rows.to(inputs.device), torch.cat((drawn, labels)).unique().to(inputs.device))


def _arriving(inputs: Inputs, rows: Tensor, logprob_R: Tensor, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """d_logprob and d_entropy of these rows, fp64."""
    none = torch.zeros_like(logprob_R)
    if gradient in (Gradient.PAIR, Gradient.LOGPROB):
        d_entropy = inputs.d_entropy_T[rows].double() if gradient is Gradient.PAIR else none
        return inputs.d_logprob_T[rows].double(), d_entropy
    if gradient is Gradient.NLL:
        return none - 1 / inputs.case.tokens, none
    d_entropy = none + inputs.entropy_weight if gradient is Gradient.POLICY_ENTROPY else none
    return _policy(inputs, rows, logprob_R).d_logprob_T, d_entropy


def _policy(inputs: Inputs, rows: Tensor | slice, logprob: Tensor) -> reference.ClippedPolicyLoss:
    parts = (part[rows].double() for part in (inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T))
    return reference.clipped_policy_loss(logprob, *parts, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)


def _exact_tokenwise(inputs: Inputs) -> Exact:
    logprob_T = inputs.logprob_T.double().requires_grad_()
    loss = TOKENWISE_LOSSES[inputs.case.operation].definition(inputs, logprob_T)
    return Exact(loss=loss.detach(), d_logprob_T=torch.autograd.grad(loss, logprob_T)[0])


def _exact(inputs: Inputs, sample: Sample, gradient: Gradient) -> Exact:
    case = inputs.case
    whole = 2 * case.tokens * case.vocabulary * case.hidden <= MOST_OPERATIONS[inputs.device.type]
    everything = case.is_linear and gradient is not Gradient.NONE and whole
    wanted = torch.arange(case.tokens, device=inputs.device) if everything else sample.rows
    logprobs, entropies, d_rows = [], [], []
    d_weight_UD = torch.zeros(len(sample.units), case.hidden, dtype=torch.float64, device=inputs.device)
    for chunk in row_chunks(len(wanted), case.vocabulary, inputs.device):
        rows = wanted[chunk]
        logits = inputs.logits_of(rows, torch.float64).requires_grad_(gradient is not Gradient.NONE)
        logprob, entropy = reference.logprob_entropy(logits, inputs.labels_T[rows])
        logprobs.append(logprob.detach())
        entropies.append(entropy.detach())
        if gradient is Gradient.NONE:
            continue
        (d_logits,) = torch.autograd.grad((logprob, entropy), logits, _arriving(inputs, rows, logprob.detach(), gradient))
        kept = torch.isin(rows, sample.rows)
        if case.is_linear:
            d_rows.append(d_logits[kept] @ inputs.weight_VD.double())
            d_weight_UD += d_logits[:, sample.units].T @ inputs.hidden_TD[rows].double()
        else:
            d_rows.append(d_logits[kept])
    logprob_R, entropy_R = torch.cat(logprobs), torch.cat(entropies)
    loss = _loss(inputs, logprob_R, entropy_R, gradient) if everything else None
    compared = sample.rows if everything else slice(None)
    d_rows_R = torch.cat(d_rows) if d_rows else None
    return Exact(
        logprob_R=logprob_R[compared],
        entropy_R=entropy_R[compared],
        loss=loss,
        d_logits_RV=None if case.is_linear else d_rows_R,
        d_hidden_RD=d_rows_R if case.is_linear else None,
        d_weight_UD=d_weight_UD if everything else None,
    )


def _loss(inputs: Inputs, logprob_T: Tensor, entropy_T: Tensor, gradient: Gradient) -> Tensor | None:
    if gradient is Gradient.NLL:
        return -logprob_T.mean()
    if gradient in (Gradient.POLICY, Gradient.POLICY_ENTROPY):
        loss = _policy(inputs, slice(None), logprob_T).loss
        return loss + inputs.entropy_weight * entropy_T.sum() if gradient is Gradient.POLICY_ENTROPY else loss
    return None
