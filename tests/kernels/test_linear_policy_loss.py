"""The loss head against its definition in `kernels.reference`, which autograd differentiates on whole logits in fp64.

In fp32 and bf16 the measure is the naive path: whole logits of the inputs' dtype, log_softmax, autograd. The loss head may be off
by NAIVE_RATIO times the naive error (fp32), plus the rounding of the result to its dtype; in bf16 it must beat the naive path.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels.linear_logprob_entropy as chunking
from kernels import reference
from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLoss, PolicyLossInputs, linear_policy_loss
from kernels.matmul import matmul_fp32

TOKENS, HIDDEN, VOCABULARY = 29, 16, 83
NAIVE_RATIO = 2.0


def problem(*, weight_0: bool = True, dtype=torch.float64, seed: int = 0, **fields) -> tuple[Tensor, Tensor, PolicyLossInputs]:
    """Hidden states, output weight and inputs with ratios on both sides of both clips, and a few tokens that take no part."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    temperature = fields.get("temperature", 1.0)
    logprob, _ = reference.logprob_entropy(hidden.double() @ weight.double().T, labels, temperature)
    wide = torch.promote_types(dtype, torch.float32)
    shift, gap = (torch.randn(TOKENS, generator=generator, dtype=torch.float64) for _ in range(2))
    token_weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.1
    if weight_0:
        token_weight[[0, 7, 28]] = 0
    inputs = PolicyLossInputs(
        labels_T=labels,
        old_logprob_T=(logprob + 0.3 * shift).to(wide),
        advantage_T=torch.randn(TOKENS, generator=generator, dtype=torch.float64).to(wide),
        weight_T=token_weight.to(wide),
        clip_low=0.2,
        clip_high=0.28,
        ref_logprob_T=(logprob + 0.2 * gap).to(wide),
    )
    return hidden, weight, replace(inputs, **fields)


FIELDS = {
    "policy alone": {},
    "entropy": {"entropy_weight": 0.05},
    "entropy pushed up": {"entropy_weight": -0.05, "temperature": 0.7},
    "reference": {"kl_coefficient": 0.4, "entropy_weight": 0.03},
    "temperature per token": {"temperature": torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64), "entropy_weight": 0.02},
    "no reference": {"ref_logprob_T": None},
}


def defined(logits: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, reference.ClippedPolicyLoss, Tensor, Tensor]:
    """(loss, clipped loss with its sums, logprob, entropy) by the definition, differentiable by the logits."""
    logprob, entropy = reference.logprob_entropy(logits, inputs.labels_T, inputs.temperature)
    clipped = reference.clipped_policy_loss(
        logprob,
        inputs.old_logprob_T,
        inputs.advantage_T,
        inputs.weight_T,
        clip_low=inputs.clip_low,
        clip_high=inputs.clip_high,
        ref_logprob_T=inputs.ref_logprob_T,
        kl_coefficient=inputs.kl_coefficient,
    )
    entropy_sum = (entropy * (inputs.weight_T != 0)).sum()
    return clipped.loss + inputs.entropy_weight * entropy_sum, clipped, logprob, entropy


def by_head(hidden: Tensor, weight: Tensor, inputs: PolicyLossInputs) -> tuple[PolicyLoss, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = linear_policy_loss(hidden, weight, inputs)
    result.loss.backward()
    return result, hidden.grad, weight.grad


def by_definition(hidden: Tensor, weight: Tensor, inputs: PolicyLossInputs):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = defined(hidden @ weight.T, inputs)
    parts[0].backward()
    return parts, hidden.grad, weight.grad


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("chunk_elements", [1 << 23, VOCABULARY, 5 * VOCABULARY, 28 * VOCABULARY])
@pytest.mark.parametrize("name", FIELDS)
def test_fp64_is_the_definition(name, chunk_elements, monkeypatch):
    """One chunk; one row a chunk; a last chunk that is shorter; a last chunk of one row, which takes no part."""
    monkeypatch.setitem(chunking.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden, weight, inputs = problem(**FIELDS[name])
    result, d_hidden, d_weight = by_head(hidden, weight, inputs)
    (loss, clipped, logprob, entropy), expected_d_hidden, expected_d_weight = by_definition(hidden, weight, inputs)
    part = inputs.weight_T != 0
    assert close(result.loss, loss)
    assert close(result.policy_loss, clipped.loss)
    assert close(result.logprob_T[part], logprob[part])
    assert close(result.entropy_T[part], entropy[part])
    assert close(result.entropy_sum, entropy[part].sum())
    assert close(result.kl_sum, clipped.kl_sum)
    assert (result.clipped_low, result.clipped_high) == (clipped.clipped_low, clipped.clipped_high)
    assert min(result.clipped_low, result.clipped_high) > 0, "the problem has tokens beyond both clips"
    assert close(torch.stack([result.ratio_max, result.ratio_min]), torch.stack([clipped.ratio_max, clipped.ratio_min]))
    gap = torch.zeros(1, dtype=torch.float64) if inputs.ref_logprob_T is None else (inputs.ref_logprob_T - logprob)[part]
    assert close(result.ref_kl_sum, (gap.exp() - 1 - gap).sum())
    assert close(d_hidden, expected_d_hidden)
    assert close(d_weight, expected_d_weight)
    assert not any(tensor.requires_grad for tensor in (result.policy_loss, result.entropy_sum, result.logprob_T))


def test_fp64_gradient_is_that_of_central_differences():
    """The definition's own gradient is autograd's; this one owes nothing to it. Ratios near a clip's kink are moved away."""
    hidden, weight, inputs = problem(entropy_weight=0.05, kl_coefficient=0.3, temperature=0.8)
    logprob = defined(hidden @ weight.T, inputs)[2]
    ratio = (logprob - inputs.old_logprob_T).exp()
    near = ((ratio - 0.8).abs() < 1e-2) | ((ratio - 1.28).abs() < 1e-2)
    inputs = replace(inputs, old_logprob_T=torch.where(near, logprob, inputs.old_logprob_T))
    _, d_hidden, d_weight = by_head(hidden, weight, inputs)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        by_hidden, by_weight = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (hidden, weight))
        step = 1e-6
        up, down = (linear_policy_loss(hidden + s * by_hidden, weight + s * by_weight, inputs).loss for s in (step, -step))
        expected = (d_hidden * by_hidden).sum() + (d_weight * by_weight).sum()
        assert ((up - down) / (2 * step)).item() == pytest.approx(expected.item(), rel=1e-6)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_against_the_naive_path(name, dtype, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_ELEMENTS, "cpu", 8 * VOCABULARY)
    errors: dict[str, list[float]] = {"head": [0.0] * 3, "naive": [0.0] * 3}
    largest = [0.0] * 3
    for seed in range(4):
        hidden, weight, inputs = problem(dtype=dtype, seed=seed, **FIELDS[name])
        exact_inputs = replace(inputs, ref_logprob_T=None if inputs.ref_logprob_T is None else inputs.ref_logprob_T.double())
        exact_parts, *exact_gradients = by_definition(hidden.double(), weight.double(), exact_inputs)
        exact = [exact_parts[0], *exact_gradients]
        result, *gradients = by_head(hidden, weight, inputs)
        naive_parts, *naive_gradients = by_definition(hidden, weight, inputs)
        for at in range(3):
            largest[at] = max(largest[at], exact[at].abs().max().item())
            errors["head"][at] = max(errors["head"][at], error([result.loss, *gradients][at], exact[at]))
            errors["naive"][at] = max(errors["naive"][at], error([naive_parts[0], *naive_gradients][at], exact[at]))
    ratio = NAIVE_RATIO if dtype == torch.float32 else 1.0
    for at, what in enumerate(("loss", "d_hidden", "d_weight")):
        rounding = torch.finfo(torch.float32 if at == 0 else dtype).eps * largest[at]
        assert errors["head"][at] <= ratio * errors["naive"][at] + rounding, what


def test_gradient_dtypes_and_scaling():
    """The incoming gradient scales both, and each gradient has its input's dtype."""
    hidden, weight, inputs = problem(dtype=torch.bfloat16)
    _, d_hidden, d_weight = by_head(hidden, weight, inputs)
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    (4 * linear_policy_loss(hidden, weight, inputs).loss).backward()
    assert torch.equal(hidden.grad, 4 * d_hidden)
    assert torch.equal(weight.grad, 4 * d_weight)


def test_weight_0_takes_no_part():
    """Whatever stands in such a row, NaN included, it changes no result and gets a zero gradient."""
    hidden, weight, inputs = problem(entropy_weight=0.05, kl_coefficient=0.2)
    out = inputs.weight_T == 0
    result, d_hidden, d_weight = by_head(hidden, weight, inputs)
    assert (d_hidden[out] == 0).all()
    assert (d_hidden[~out] != 0).any(1).all()
    odd = replace(
        inputs,
        labels_T=torch.where(out, 3, inputs.labels_T),
        old_logprob_T=inputs.old_logprob_T.masked_fill(out, math.nan),
        advantage_T=inputs.advantage_T.masked_fill(out, math.nan),
        ref_logprob_T=inputs.ref_logprob_T.masked_fill(out, math.nan),
    )
    hidden[out] = 50.0
    odd_result, odd_d_hidden, odd_d_weight = by_head(hidden, weight, odd)
    for field in PolicyLoss.__slots__:
        assert torch.equal(getattr(result, field), getattr(odd_result, field)), field
    assert torch.equal(d_hidden, odd_d_hidden)
    assert torch.equal(d_weight, odd_d_weight)
    fields = ("labels_T", "old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T")
    without = linear_policy_loss(
        hidden[~out], weight, replace(inputs, **{field: getattr(inputs, field)[~out] for field in fields})
    )
    for field in ("loss", "entropy_sum", "kl_sum", "ref_kl_sum", "ratio_max", "ratio_min"):
        assert close(getattr(without, field), getattr(result, field)), field


def test_a_ratio_below_1_is_the_largest_where_all_are():
    hidden, weight, inputs = problem()
    logprob = defined(hidden @ weight.T, inputs)[2]
    result = linear_policy_loss(hidden, weight, replace(inputs, old_logprob_T=logprob + math.log(2)))
    assert result.ratio_max.item() == pytest.approx(0.5)
    result = linear_policy_loss(hidden, weight, replace(inputs, old_logprob_T=logprob - math.log(2)))
    assert result.ratio_min.item() == pytest.approx(2.0)


def test_no_tokens():
    """A rank without sequences still takes part in the collectives: a loss of 0, and gradients of 0, not none."""
    hidden, weight, inputs = problem(entropy_weight=0.1, kl_coefficient=0.1)
    fields = ("labels_T", "old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T")
    result, d_hidden, d_weight = by_head(hidden[:0], weight, replace(inputs, **{f: getattr(inputs, f)[:0] for f in fields}))
    assert (result.loss.item(), result.entropy_sum.item(), result.clipped_low.item(), result.kl_sum.item()) == (0, 0, 0, 0)
    assert (result.ratio_max.item(), result.ratio_min.item()) == (-math.inf, math.inf)
    assert d_hidden.shape == (0, HIDDEN)
    assert (d_weight == 0).all()


@pytest.mark.parametrize(
    ("advantage", "ratio", "free"),
    [
        (1.0, 1.2799, True),
        (1.0, 1.2801, False),
        (1.0, 0.1, True),
        (-1.0, 0.8001, True),
        (-1.0, 0.7999, False),
        (-1.0, 9.0, True),
        (0.0, 1.0, False),
    ],
)
def test_clip_edges(advantage, ratio, free):
    hidden, weight, inputs = problem(weight_0=False, ref_logprob_T=None)
    logprob = defined(hidden @ weight.T, inputs)[2]
    inputs = replace(inputs, old_logprob_T=logprob - math.log(ratio), advantage_T=torch.full_like(inputs.advantage_T, advantage))
    result, d_hidden, _ = by_head(hidden, weight, inputs)
    assert bool((d_hidden != 0).any()) is free
    held = min(max(ratio, 0.8), 1.28)
    assert result.loss.item() == pytest.approx(-min(ratio * advantage, held * advantage) * inputs.weight_T.sum().item())


def test_logits_far_from_0_stay_finite():
    hidden, weight, inputs = problem(dtype=torch.float32, entropy_weight=0.05)
    hidden = hidden * 1e4
    logprob = defined((hidden @ weight.T).double(), inputs)[2]
    result, d_hidden, d_weight = by_head(hidden, weight, replace(inputs, old_logprob_T=logprob.float(), ref_logprob_T=None))
    assert all(torch.isfinite(tensor).all() for tensor in (result.loss, result.entropy_sum, d_hidden, d_weight))
    assert (logprob < -1e4).any(), "the labels' logits lie far below the largest"


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation's result has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("head", ["policy", "logprob"])
def test_whole_logits_never_exist(head, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_ELEMENTS, "cpu", 4 * VOCABULARY)
    hidden, weight, inputs = problem()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    saved = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        if head == "policy":
            loss = linear_policy_loss(hidden, weight, inputs).loss
        else:
            loss = torch.stack(linear_logprob_entropy(hidden, weight, inputs.labels_T)).sum()
        loss.backward()
    limit = max(hidden.numel(), weight.numel(), 4 * VOCABULARY)
    assert limit < TOKENS * VOCABULARY
    assert largest.numel == limit
    assert max(saved) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype):
    hidden, weight, inputs = problem(dtype=dtype, entropy_weight=0.05, kl_coefficient=0.2)
    first, second = by_head(hidden, weight, inputs), by_head(hidden, weight, inputs)
    assert all(torch.equal(getattr(first[0], field), getattr(second[0], field)) for field in PolicyLoss.__slots__)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_without_gradient_the_same_numbers():
    hidden, weight, inputs = problem(dtype=torch.float32, entropy_weight=0.05)
    expected, *_ = by_head(hidden, weight, inputs)
    with torch.no_grad():
        result = linear_policy_loss(hidden.requires_grad_(), weight, inputs)
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, expected.loss)
    scored, entropy = linear_logprob_entropy(hidden, weight, torch.where(inputs.weight_T != 0, inputs.labels_T, -100))
    assert torch.equal(scored, expected.logprob_T), (
        "what scores and what trains give the same log-probability: a ratio of exactly 1"
    )
    assert torch.equal(entropy, expected.entropy_T)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64)])
def test_linear_logprob_entropy_is_the_definition(temperature, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_ELEMENTS, "cpu", 4 * VOCABULARY)
    hidden, weight, inputs = problem()
    labels = inputs.labels_T.clone()
    labels[[2, 28]] = reference.IGNORE
    generator = torch.Generator().manual_seed(9)
    incoming = [torch.randn(TOKENS, generator=generator, dtype=torch.float64) for _ in range(2)]
    results = []
    for function in (
        lambda h, w: linear_logprob_entropy(h, w, labels, temperature),
        lambda h, w: reference.logprob_entropy(h @ w.T, labels, temperature),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        outputs = function(*leaves)
        torch.autograd.backward(outputs, incoming)
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    assert all(close(got, expected) for got, expected in zip(*results, strict=True))


def test_matmul_widens_before_it_multiplies():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 64, generator=generator), torch.randn(64, 7, generator=generator)
    product = matmul_fp32(left.bfloat16(), right.bfloat16())
    exact = left.bfloat16().double() @ right.bfloat16().double()
    assert product.dtype == torch.float32
    assert error(product, exact) < 1e-5, "rounded to bf16 it would be off by 1e-2"
    assert matmul_fp32(left.double(), right.double()).dtype == torch.float64
    assert matmul_fp32(left, right.bfloat16()).dtype == torch.float32
