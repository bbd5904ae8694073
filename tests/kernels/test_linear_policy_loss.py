"""The loss head against its definition in `kernels.reference`, which autograd differentiates on whole logits in fp64.

In fp32 and bf16 the measure is the naive path: whole logits of the inputs' dtype, log_softmax, autograd. The loss head may be off
by NAIVE_RATIO times the naive error (fp32), plus the rounding of the result to its dtype; in bf16 it must beat the naive path.
Where a single problem decides, naive may be exact by luck: there `roundings` says what else is allowed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from head_problems import (
    FIELDS,
    HIDDEN,
    VOCABULARY,
    Problem,
    by_definition,
    by_head,
    close,
    defined,
    largest_error,
    problem,
    problems,
)
from hypothesis import given, settings
from kernel_paths import REFERENCE, Path, set_chunk_rows
from torch import Tensor

from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLoss, linear_policy_loss

NAIVE_RATIO = 2.0


@pytest.mark.parametrize("chunk_rows", [100, 1, 4, 9])
@pytest.mark.parametrize("name", FIELDS)
def test_fp64_is_the_definition(name, chunk_rows, monkeypatch):
    """One chunk; one row a chunk; a last chunk that is shorter; a last chunk of one row."""
    set_chunk_rows(monkeypatch, REFERENCE, chunk_rows, VOCABULARY, 8)
    given_problem = problem(**FIELDS[name])
    inputs = given_problem.inputs
    result, d_hidden_TD, d_weight_VD = by_head(given_problem)
    (loss, clipped, logprob_T, entropy_T), expected_d_hidden_TD, expected_d_weight_VD = by_definition(given_problem)
    part_T = inputs.weight_T != 0
    assert close(result.loss, loss)
    assert close(result.policy_loss, clipped.loss)
    assert close(result.logprob_T[part_T], logprob_T[part_T])
    assert close(result.entropy_T[part_T], entropy_T[part_T])
    assert (result.logprob_T[~part_T] == 0).all()
    assert (result.entropy_T[~part_T] == 0).all()
    assert close(result.entropy_sum, entropy_T[part_T].sum())
    assert close(result.kl_sum, clipped.kl_sum)
    assert (result.clipped_low, result.clipped_high) == (clipped.clipped_low, clipped.clipped_high)
    assert min(result.clipped_low, result.clipped_high) > 0, "the problem has tokens beyond both clips"
    assert close(torch.stack([result.ratio_max, result.ratio_min]), torch.stack([clipped.ratio_max, clipped.ratio_min]))
    gap_T = torch.zeros(1, dtype=torch.float64) if inputs.ref_logprob_T is None else (inputs.ref_logprob_T - logprob_T)[part_T]
    assert close(result.ref_kl_sum, (gap_T.exp() - 1 - gap_T).sum())
    assert close(d_hidden_TD, expected_d_hidden_TD)
    assert close(d_weight_VD, expected_d_weight_VD)
    assert not any(tensor.requires_grad for tensor in (result.policy_loss, result.entropy_sum, result.logprob_T))


def test_fp64_gradient_is_that_of_central_differences():
    """The definition's own gradient is autograd's; this one owes nothing to it. Ratios near a clip's kink are moved away."""
    hidden_TD, weight_VD, inputs = problem(entropy_weight=0.05, kl_coefficient=0.3, temperature=0.8)
    logprob_T = defined(hidden_TD @ weight_VD.T, inputs)[2]
    ratio_T = (logprob_T - inputs.old_logprob_T).exp()
    near_T = ((ratio_T - 0.8).abs() < 1e-2) | ((ratio_T - 1.28).abs() < 1e-2)
    inputs = replace(inputs, old_logprob_T=torch.where(near_T, logprob_T, inputs.old_logprob_T))
    _, d_hidden_TD, d_weight_VD = by_head(Problem(hidden_TD, weight_VD, inputs))
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        by = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (hidden_TD, weight_VD)]
        step = 1e-6
        up, down = (linear_policy_loss(hidden_TD + s * by[0], weight_VD + s * by[1], inputs).loss for s in (step, -step))
        expected = (d_hidden_TD * by[0]).sum() + (d_weight_VD * by[1]).sum()
        assert ((up - down) / (2 * step)).item() == pytest.approx(expected.item(), rel=1e-6)


@functools.cache
def yardstick(name: str, dtype: torch.dtype) -> list[tuple[Tensor, float, float]]:
    """(exact of seed 0, naive's largest error over 8 problems, the largest number there) of loss, d_hidden and d_weight."""
    errors, largest = [0.0] * 3, [0.0] * 3
    for seed in reversed(range(8)):
        given_problem = problem(dtype=dtype, seed=seed, **FIELDS[name])
        (exact_parts, *exact_gradients), (naive_parts, *naive_gradients) = (
            by_definition(given_problem.double()),
            by_definition(given_problem),
        )
        exact = [exact_parts[0].detach(), *exact_gradients]
        for at, naive in enumerate([naive_parts[0].detach(), *naive_gradients]):
            errors[at] = max(errors[at], largest_error(naive, exact[at]))
            largest[at] = max(largest[at], exact[at].abs().max().item())
    return list(zip(exact, errors, largest, strict=True))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_against_the_naive_path(path: Path, name, dtype, monkeypatch):
    set_chunk_rows(monkeypatch, path, 4, VOCABULARY)
    result, *gradients = by_head(problem(dtype=dtype, **FIELDS[name]), path)
    ratio = NAIVE_RATIO if dtype == torch.float32 else 1.0
    solution = (("loss", result.loss), ("d_hidden", gradients[0]), ("d_weight", gradients[1]))
    for (what, got), (exact, naive, largest) in zip(solution, yardstick(name, dtype), strict=True):
        rounding = torch.finfo(torch.float32 if what == "loss" else dtype).eps * largest
        assert largest_error(got, exact) <= ratio * naive + rounding, what


def roundings(exact: Problem, narrow: torch.dtype) -> tuple[float, float, float]:
    """What rounding may do to (loss, d_hidden, d_weight): a sum of D products in fp32 to every logit, whose gradient follows, and
    `narrow`'s rounding to every d_logit and to the results."""
    hidden_TD, weight_VD, inputs = exact
    leaf_TV = (hidden_TD @ weight_VD.T).requires_grad_()
    defined(leaf_TV, inputs)[0].backward()
    d_TV = leaf_TV.grad.abs()
    coldest = inputs.temperature.min().item() if isinstance(inputs.temperature, Tensor) else inputs.temperature
    logit = 2.0**-22 * (1 + (hidden_TD.abs() @ weight_VD.abs().T).max().item() / coldest)
    slope_T = (
        inputs.weight_T * (inputs.advantage_T.abs() + inputs.kl_coefficient) * 4 + abs(inputs.entropy_weight) * 4
    ) / coldest
    d_logit = 2 * torch.finfo(narrow).eps * d_TV + 8 * logit * slope_T.unsqueeze(1)
    d_hidden, d_weight = (d_logit @ weight_VD.abs()).max(), (d_logit.T @ hidden_TD.abs()).max()
    return (8 * logit * slope_T).sum().item() * coldest + 1e-7, d_hidden.item() + 1e-7, d_weight.item() + 1e-7


@settings(max_examples=20, deadline=None, derandomize=True)
@given(given_problem=problems())
def test_any_shape_and_dtype(path: Path, given_problem: Problem):
    exact_parts, *exact_gradients = by_definition(given_problem.double())
    result, *gradients = by_head(given_problem, path)
    naive_parts, *naive_gradients = by_definition(given_problem)
    inputs = [tensor.dtype for tensor in given_problem[:2]]
    assert [gradient.dtype for gradient in gradients] == inputs
    narrow = min(inputs, key=lambda dtype: -torch.finfo(dtype).eps)
    for at, what in enumerate(("loss", "d_hidden", "d_weight")):
        exact = [exact_parts[0], *exact_gradients][at]
        ours, naive = ([x[0], *y][at] for x, y in (((result.loss,), gradients), (naive_parts, naive_gradients)))
        allowed = NAIVE_RATIO * largest_error(naive, exact) + roundings(given_problem.double(), narrow)[at]
        assert largest_error(ours, exact) <= allowed, what
    part_T = given_problem.inputs.weight_T != 0
    assert (gradients[0][~part_T] == 0).all()
    assert result.entropy_sum.item() == pytest.approx(exact_parts[3][part_T].sum().item(), rel=1e-4, abs=1e-4)


def test_each_gradient_has_its_inputs_dtype(path: Path):
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        given_problem = problem(dtype=dtypes[0], weight_dtype=dtypes[1])
        result, d_hidden_TD, d_weight_VD = by_head(given_problem, path)
        assert (d_hidden_TD.dtype, d_weight_VD.dtype, result.loss.dtype) == (*dtypes, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_0_takes_no_part(path: Path, dtype):
    """Whatever stands in such a row, NaN included, it changes no result and gets a zero gradient."""
    hidden_TD, weight_VD, inputs = problem(entropy_weight=0.05, kl_coefficient=0.2, dtype=dtype)
    out_T = inputs.weight_T == 0
    result, d_hidden_TD, d_weight_VD = by_head(Problem(hidden_TD, weight_VD, inputs), path)
    assert (d_hidden_TD[out_T] == 0).all()
    assert (d_hidden_TD[~out_T] != 0).any(1).all()
    odd = replace(
        inputs,
        labels_T=torch.where(out_T, 3, inputs.labels_T),
        old_logprob_T=inputs.old_logprob_T.masked_fill(out_T, math.nan),
        advantage_T=inputs.advantage_T.masked_fill(out_T, math.inf),
        ref_logprob_T=inputs.ref_logprob_T.masked_fill(out_T, -math.inf),
    )
    odd_problem = Problem(hidden_TD.masked_fill(out_T.unsqueeze(1), 50.0), weight_VD, odd)
    odd_result, odd_d_hidden_TD, odd_d_weight_VD = by_head(odd_problem, path)
    for field in PolicyLoss.__slots__:
        assert torch.equal(getattr(result, field), getattr(odd_result, field)), field
    assert torch.equal(d_hidden_TD, odd_d_hidden_TD)
    assert torch.equal(d_weight_VD, odd_d_weight_VD)
    without, _, _ = by_head(Problem(hidden_TD, weight_VD, inputs).tokens(~out_T), path)
    for field in ("loss", "entropy_sum", "kl_sum", "ref_kl_sum", "ratio_max", "ratio_min"):
        assert close(getattr(without, field), getattr(result, field), 1e-12 if dtype == torch.float64 else 1e-5), field


def test_an_ignored_label_gives_no_entropy_and_no_gradient_by_the_logits(path: Path):
    given_problem = problem(dtype=torch.float32, weight_0=False, entropy_weight=0.1)
    labels_T = given_problem.inputs.labels_T.clone()
    labels_T[4] = -100
    ignored = given_problem._replace(inputs=replace(given_problem.inputs, labels_T=labels_T))
    result, d_hidden_TD, _ = by_head(ignored, path)
    assert (result.logprob_T[4], result.entropy_T[4]) == (0, 0)
    assert (d_hidden_TD[4] == 0).all()


def test_all_weights_0(path: Path):
    given_problem = problem(dtype=torch.float32, entropy_weight=0.1, kl_coefficient=0.1)
    nothing = replace(given_problem.inputs, weight_T=torch.zeros_like(given_problem.inputs.weight_T))
    result, d_hidden_TD, d_weight_VD = by_head(given_problem._replace(inputs=nothing), path)
    assert (result.loss.item(), result.entropy_sum.item(), result.ratio_max.item()) == (0, 0, -math.inf)
    assert (d_hidden_TD == 0).all()
    assert (d_weight_VD == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(path: Path, dtype):
    """A rank without sequences still takes part in the collectives: a loss of 0, and gradients of 0, not none."""
    result, d_hidden_TD, d_weight_VD = by_head(
        problem(entropy_weight=0.1, kl_coefficient=0.1, dtype=dtype).tokens(slice(0, 0)), path
    )
    assert (result.loss.item(), result.entropy_sum.item(), result.clipped_low.item(), result.kl_sum.item()) == (0, 0, 0, 0)
    assert (result.ratio_max.item(), result.ratio_min.item()) == (-math.inf, math.inf)
    assert d_hidden_TD.shape == (0, HIDDEN)
    assert (d_weight_VD == 0).all()


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_edges(path: Path, advantage, ratio, free, dtype):
    given_problem = problem(weight_0=False, ref_logprob_T=None, dtype=dtype)
    logprob_T = defined(given_problem.hidden_TD.double() @ given_problem.weight_VD.double().T, given_problem.double().inputs)[2]
    inputs = replace(
        given_problem.inputs,
        old_logprob_T=(logprob_T - math.log(ratio)).to(dtype),
        advantage_T=torch.full_like(given_problem.inputs.advantage_T, advantage),
    )
    result, d_hidden_TD, _ = by_head(given_problem._replace(inputs=inputs), path)
    assert bool((d_hidden_TD != 0).any()) is free
    held = min(max(ratio, 0.8), 1.28)
    expected = -min(ratio * advantage, held * advantage) * inputs.weight_T.sum().item()
    assert result.loss.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 1e-4)


def test_logits_far_from_0_stay_finite(path: Path):
    given_problem = problem(dtype=torch.float32, entropy_weight=0.05, size=1e4, ref_logprob_T=None)
    assert (given_problem.inputs.old_logprob_T < -1e4).any(), "the labels' logits lie far below the largest"
    result, d_hidden_TD, d_weight_VD = by_head(given_problem, path)
    assert all(torch.isfinite(tensor).all() for tensor in (result.loss, result.entropy_sum, d_hidden_TD, d_weight_VD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(path: Path, dtype, monkeypatch):
    set_chunk_rows(monkeypatch, path, 4, VOCABULARY)
    given_problem = problem(dtype=dtype, entropy_weight=0.05, kl_coefficient=0.2)
    first, second = by_head(given_problem, path), by_head(given_problem, path)
    assert all(torch.equal(getattr(first[0], field), getattr(second[0], field)) for field in PolicyLoss.__slots__)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_without_gradient_the_same_numbers(path: Path):
    given_problem = problem(dtype=torch.float32, entropy_weight=0.05)
    expected, *_ = by_head(given_problem, path)
    hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
    with torch.no_grad():
        result = linear_policy_loss(hidden_TD.requires_grad_(), weight_VD, inputs)
    assert not result.loss.requires_grad
    for field in PolicyLoss.__slots__:
        assert torch.equal(getattr(result, field).cpu(), getattr(expected, field)), field
    labels_T = torch.where(inputs.weight_T != 0, inputs.labels_T, -100)
    logprob_T, entropy_T = linear_logprob_entropy(hidden_TD, weight_VD, labels_T)
    assert torch.equal(logprob_T.cpu(), expected.logprob_T), "what scores and what trains agree: a ratio of exactly 1"
    assert torch.equal(entropy_T.cpu(), expected.entropy_T)


@pytest.mark.parametrize("name", ["labels_T", "old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T"])
@pytest.mark.parametrize("length", [1, 9, 11])
def test_a_number_too_few_is_no_neighbours_number(path: Path, name, length):
    """A kernel that is given an address alone would read what lies behind."""
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=torch.float32)))
    long_T = torch.cat([getattr(inputs, name)] * 2)
    with pytest.raises(ValueError, match=rf"^{name}: expected \[10\], one a token, got \[{length}\]"):
        linear_policy_loss(hidden_TD, weight_VD, replace(inputs, **{name: long_T[:length]}))
    if name == "labels_T":
        with pytest.raises(ValueError, match=rf"^labels_T: expected \[10\], one a token, got \[{length}\]"):
            linear_logprob_entropy(hidden_TD, weight_VD, long_T[:length])
