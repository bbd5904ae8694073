"""Problems for the loss head: hidden states, output weight and per-token inputs, and the two ways to solve them.

`by_head` is what is tested. `by_definition` is `kernels.reference` on whole logits, which autograd differentiates: the truth in
fp64; in fp32 and bf16, with logits of the inputs' dtype, the naive path that the head is measured against.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from kernel_paths import REFERENCE, Path
from torch import Tensor

from kernels import reference
from kernels.linear_policy_loss import PolicyLoss, PolicyLossInputs, linear_policy_loss

TOKENS, HIDDEN, VOCABULARY = 10, 16, 83
TOKEN_FIELDS = ("labels_T", "old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T")


class Problem(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    inputs: PolicyLossInputs

    def double(self) -> Problem:
        """The same numbers in fp64."""
        floats = {name: getattr(self.inputs, name) for name in TOKEN_FIELDS[1:]}
        inputs = replace(self.inputs, **{name: None if x is None else x.double() for name, x in floats.items()})
        return Problem(self.hidden_TD.double(), self.weight_VD.double(), inputs)

    def tokens(self, which: slice | Tensor) -> Problem:
        """Some of the tokens."""
        fields = {name: getattr(self.inputs, name) for name in TOKEN_FIELDS}
        if isinstance(self.inputs.temperature, Tensor):
            fields["temperature"] = self.inputs.temperature
        inputs = replace(self.inputs, **{name: None if x is None else x[which] for name, x in fields.items()})
        return Problem(self.hidden_TD[which], self.weight_VD, inputs)


def problem(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, shape: tuple[int, int, int] = (TOKENS, HIDDEN, VOCABULARY),
    weight_0: bool = True, weight_dtype: torch.dtype | None = None, size: float = 1.0, **fields,
) -> Problem:  # fmt: skip
    """Ratios on both sides of both clips and none within 1e-3 of one, and a few tokens that take no part.

    shape: (T, D, V). size: standard deviation of the hidden states; the logits' is that times sqrt(D).
    """
    tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_TD, weight_VD = (normal(tokens, hidden) * size).to(dtype), normal(vocabulary, hidden).to(weight_dtype or dtype)
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    logprob_T, _ = reference.logprob_entropy(hidden_TD.double() @ weight_VD.double().T, labels_T, fields.get("temperature", 1.0))
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    shift_T, gap_T = 0.5 * normal(tokens), 0.2 * normal(tokens)
    for bound in (0.8, 1.28):
        shift_T = torch.where(((-shift_T).exp() / bound - 1).abs() < 1e-3, 0.05, shift_T)
    weight_T = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1
    if weight_0:
        weight_T[::7] = 0
    inputs = PolicyLossInputs(
        labels_T=labels_T,
        old_logprob_T=(logprob_T + shift_T).to(wide),
        advantage_T=normal(tokens).to(wide),
        weight_T=weight_T.to(wide),
        clip_low=0.2,
        clip_high=0.28,
        ref_logprob_T=(logprob_T + gap_T).to(wide),
    )
    return Problem(hidden_TD, weight_VD, replace(inputs, **fields))


FIELDS = {
    "policy alone": {},
    "entropy": {"entropy_weight": 0.05},
    "entropy pushed up": {"entropy_weight": -0.05, "temperature": 0.7},
    "reference": {"kl_coefficient": 0.4, "entropy_weight": 0.03},
    "temperature per token": {"temperature": torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64), "entropy_weight": 0.02},
    "no reference": {"ref_logprob_T": None},
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small ones of every dtype and shape; the tile edges of the row kernels are test_logprob_entropy.py's."""
    seed = draw(st.integers(0, 2**40))
    choice = random.Random(seed).choice
    tokens, hidden = choice([1, 2, 5]), choice([1, 3, 16, 40, 100])
    vocabulary = choice([choice(range(1, 70)), 127, 128, 129, 200, 2049])
    dtype = choice([torch.float32, torch.bfloat16, torch.float16])
    weight_dtype = choice([dtype, dtype, torch.float32, torch.bfloat16])
    temperature = choice([1.0, 0.6, 1.3, torch.linspace(0.5, 1.5, tokens)])
    return problem(
        dtype=dtype, weight_dtype=weight_dtype, seed=seed, shape=(tokens, hidden, vocabulary), weight_0=choice([True, False]),
        size=choice([0.0, 0.3, 1.0, 10.0]), temperature=temperature, entropy_weight=choice([0.0, 0.05, -0.3]),
        kl_coefficient=choice([0.0, 0.4]),
    )  # fmt: skip


def defined(logits_TV: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, reference.ClippedPolicyLoss, Tensor, Tensor]:
    """(loss, clipped loss with its sums, logprob, entropy) by the definition, differentiable by the logits."""
    logprob_T, entropy_T = reference.logprob_entropy(logits_TV, inputs.labels_T, inputs.temperature)
    clipped = reference.clipped_policy_loss(
        logprob_T, inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T, clip_low=inputs.clip_low,
        clip_high=inputs.clip_high, ref_logprob_T=inputs.ref_logprob_T, kl_coefficient=inputs.kl_coefficient,
    )  # fmt: skip
    entropy_sum = torch.where(inputs.weight_T != 0, entropy_T, 0).sum()
    return clipped.loss + inputs.entropy_weight * entropy_sum, clipped, logprob_T, entropy_T


def by_head(problem: Problem, path: Path = REFERENCE) -> tuple[PolicyLoss, Tensor, Tensor]:
    """(result, d_hidden_TD, d_weight_VD), brought back to the CPU."""
    hidden_TD, weight_VD, inputs = path.place(tuple(problem))
    hidden_TD, weight_VD = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    result = linear_policy_loss(hidden_TD, weight_VD, inputs)
    result.loss.backward()
    result = PolicyLoss(*(getattr(result, field).cpu() for field in PolicyLoss.__slots__))
    return result, hidden_TD.grad.cpu(), weight_VD.grad.cpu()


def by_definition(problem: Problem):
    """((loss, clipped loss, logprob, entropy), d_hidden_TD, d_weight_VD)."""
    hidden_TD, weight_VD = (tensor.detach().clone().requires_grad_() for tensor in problem[:2])
    same = torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
    parts = defined(hidden_TD.to(same) @ weight_VD.to(same).T, problem.inputs)
    parts[0].backward()
    return parts, hidden_TD.grad, weight_VD.grad


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


def largest_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()
