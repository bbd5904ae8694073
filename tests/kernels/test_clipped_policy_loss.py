"""clipped_policy_loss, for every way to compute it, against the reference in fp64: sums, extremes and slopes.

Each token is fp32 arithmetic of a handful of operations and each sum has few terms before a tree, so a sum may be off by a few
fp32 roundings of the sum of its terms' magnitudes, and a slope by a few of its own. No ratio lies within rounding of a clip
bound, where fp32 and fp64 may well decide differently; the bounds have a test of their own, in which fp32 is exact. k3 of a small
step is expm1(x) - x in plain PyTorch, which cancels; the kernels' series does not.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import Path
from torch import Tensor

from kernels import reference
from kernels.clipped_policy_loss import clipped_policy_loss
from kernels.reference import ClippedPolicyLoss

INF, NAN = float("inf"), float("nan")
SUMS = ("loss", "clipped_low", "clipped_high", "kl_sum", "ref_kl_sum", "ratio_max", "ratio_min")
NOTHING = {"loss": 0, "clipped_low": 0, "clipped_high": 0, "kl_sum": 0, "ref_kl_sum": 0, "ratio_max": -INF, "ratio_min": INF}


def solved(path: Path, tokens_T: tuple[Tensor, ...], **options) -> ClippedPolicyLoss:
    """On the CPU. tokens_T: log-probability, the old one, advantage and weight."""
    options = {"clip_low": 0.2, "clip_high": 0.28} | options
    result = clipped_policy_loss(*path.place(tokens_T), **{name: path.place(value) for name, value in options.items()})
    return ClippedPolicyLoss(*(field.detach().cpu() for field in result))


def one(path: Path, logprob: float, old: float, advantage: float, weight: float = 1.0, **options) -> dict[str, float]:
    """One token; "d" is its slope."""
    if "ref" in options:
        options["ref_logprob_T"] = torch.tensor([options.pop("ref")])
    result = solved(path, tuple(torch.tensor([value]) for value in (logprob, old, advantage, weight)), **options)
    return {name: getattr(result, name).item() for name in SUMS} | {"d": result.d_logprob_T.item()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], dict]:
    seed = draw(st.integers(0, 2**40))
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed).choice
    tokens = choice([choice(range(50)), 4095, 4096, 4097, 10_000])
    clip_low, clip_high = choice([(0.2, 0.2), (0.2, 0.28), (0.0, 0.5), (1.0, 9.0)])
    logprob_T = -torch.rand(tokens, generator=generator) * 10
    moved_T = (torch.randn(tokens, generator=generator) * choice([1e-5, 1e-2, 0.3, 3.0, 20.0])).clamp(-80, 80)
    ratio_T = (logprob_T - (logprob_T - moved_T)).double().exp()
    for bound in (1 - clip_low, 1 + clip_high):
        moved_T = torch.where((ratio_T / max(bound, 1e-9) - 1).abs() < 1e-5, 0.05, moved_T)
    advantage_T = torch.randn(tokens, generator=generator) * choice([0.0, 1.0, 50.0])
    weight_T = torch.rand(tokens, generator=generator) * choice([0.0, 1e-3, 1.0])
    weight_T = weight_T.masked_fill(torch.rand(tokens, generator=generator) < choice([0.0, 0.3, 1.0]), 0)
    ref_logprob_T = None
    if choice([True, False]):
        ref_logprob_T = logprob_T + torch.randn(tokens, generator=generator) * choice([1e-4, 0.5, 5.0])
    junk = choice([NAN, INF, -INF])
    tokens_T = (*(x_T.masked_fill(weight_T == 0, junk) for x_T in (logprob_T, logprob_T - moved_T, advantage_T)), weight_T)
    options = {"clip_low": clip_low, "clip_high": clip_high, "kl_coefficient": choice([0.0, 0.1, 3.0])}
    return tokens_T, options | {"ref_logprob_T": ref_logprob_T}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
def test_agrees_with_the_definition_in_fp64(path: Path, problem):
    tokens_T, options = problem
    got = solved(path, tokens_T, **options)
    assert all(field.dtype == torch.float32 for field in got)
    # The differences are taken in fp32, as a kernel's are: what is tested is what follows from them.
    logprob_T, old_logprob_T, advantage_T, weight_T = tokens_T
    active_T = weight_T != 0
    log_ratio_T = torch.where(active_T, (logprob_T - old_logprob_T).double(), 0)
    clips = {"clip_low": options["clip_low"], "clip_high": options["clip_high"]}
    zero_T = torch.zeros_like(log_ratio_T)
    policy = reference.clipped_policy_loss(log_ratio_T, zero_T, advantage_T.double(), weight_T.double(), **clips)
    loss, slope_T, size_T, kl = policy.loss, policy.d_logprob_T, policy.d_logprob_T.abs(), options["kl_coefficient"]
    ref_kl_T, gap_T = zero_T, zero_T
    if options["ref_logprob_T"] is not None:
        gap_T = torch.where(active_T, (options["ref_logprob_T"] - logprob_T).double(), 0)
        ref_kl_T = reference.k3(gap_T)
        loss = loss + (weight_T * kl * ref_kl_T).sum()
        ref_slope_T = weight_T * kl * torch.expm1(gap_T)
        slope_T, size_T = slope_T - ref_slope_T, size_T + ref_slope_T.abs()
    # Clipped tokens add to the loss what they do not add to the gradient: at most |A| times the bound.
    held = torch.where(active_T, weight_T * advantage_T.abs() * (1 + options["clip_high"]), 0).double().sum()
    cancelled, ref_cancelled = 0.0, 0.0
    if path.backend in ("reference", "cuda"):
        cancelled, ref_cancelled = (2e-7 * (x_T.abs() * active_T).sum().item() for x_T in (log_ratio_T, gap_T))
    allowed = 2e-6 * (policy.loss.abs() + size_T.sum() + (weight_T * kl * ref_kl_T).sum() + held).item()
    assert abs(got.loss.item() - loss.item()) <= allowed + kl * ref_cancelled + 1e-30
    assert ((got.d_logprob_T.double() - slope_T).abs() <= 1e-6 * size_T + 1e-37).all()
    assert got.clipped_low == policy.clipped_low
    assert got.clipped_high == policy.clipped_high
    assert got.kl_sum.item() == pytest.approx(policy.kl_sum.item(), rel=1e-6, abs=cancelled + 1e-37)
    assert got.ref_kl_sum.item() == pytest.approx(ref_kl_T.sum().item(), rel=1e-6, abs=ref_cancelled + 1e-37)
    assert got.ratio_max.item() == pytest.approx(policy.ratio_max.item(), rel=4e-7)
    assert got.ratio_min.item() == pytest.approx(policy.ratio_min.item(), rel=4e-7)


def test_the_loss_alone_is_differentiable_and_its_gradient_is_the_slope(path: Path):
    generator = torch.Generator().manual_seed(0)
    logprob_T, old_T, advantage_T, ref_T = torch.randn(4, 30, generator=generator)
    weight_T = torch.rand(30, generator=generator)
    leaves = [path.place(tensor).requires_grad_() for tensor in (logprob_T, old_T, advantage_T, weight_T, ref_T)]
    result = clipped_policy_loss(*leaves[:4], clip_low=0.2, clip_high=0.28, ref_logprob_T=leaves[4], kl_coefficient=0.1)
    assert [field.requires_grad for field in result] == [True] + [False] * 7
    (3 * result.loss).backward()
    assert torch.equal(leaves[0].grad, 3 * result.d_logprob_T)
    assert all(leaf.grad is None for leaf in leaves[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_fp32_or_fp64(path: Path, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens_T = tuple(x_T.to(dtype) for x_T in (*torch.randn(3, 20, generator=generator), torch.rand(20, generator=generator)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaf_T = path.place(tokens_T[0]).requires_grad_()
    result = clipped_policy_loss(leaf_T, *path.place(tokens_T[1:]), clip_low=0.2, clip_high=0.28)
    assert all(field.dtype == wide for field in result)
    result.loss.backward()
    assert leaf_T.grad.dtype == dtype
    want = reference.clipped_policy_loss(*(x_T.double() for x_T in tokens_T), clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(result.loss.detach().cpu().double(), want.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 4096, 4097, 50_000])
def test_two_runs_give_the_same_bits(path: Path, tokens):
    generator = torch.Generator().manual_seed(2)
    logprob_T, old_T, advantage_T, ref_T = torch.randn(4, tokens, generator=generator)
    tokens_T = (logprob_T, old_T, advantage_T, torch.rand(tokens, generator=generator))
    first, second = (solved(path, tokens_T, ref_logprob_T=ref_T, kl_coefficient=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("exponent", [-6, -4, -3, -2, -1, 0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_of_a_step_keeps_its_digits(path: Path, exponent, sign):
    """As exp(x) - 1 - x in fp32 it would have none left below 1e-4."""
    x = sign * 10.0**exponent
    got = one(path, x, 0.0, 1.0, ref=2 * x)
    moved = torch.tensor(x).double()
    exact = (torch.expm1(moved) - moved).item() if abs(x) > 1e-2 else (moved**2 * (0.5 + moved / 6 + moved**2 / 24)).item()
    cancelled = 1e-7 * abs(x) if path.backend in ("reference", "cuda") else 0
    assert got["kl_sum"] == pytest.approx(exact, rel=4e-7, abs=cancelled)
    assert got["ref_kl_sum"] == pytest.approx(exact, rel=4e-7, abs=cancelled)


@pytest.mark.parametrize("log_ratio", [-120.0, -80.0, -30.0, 30.0, 80.0, 88.0])
def test_extreme_ratios_are_what_they_are(path: Path, log_ratio):
    got = one(path, log_ratio, 0.0, -1.0)
    assert got["ratio_max"] == got["ratio_min"] == pytest.approx(math.exp(log_ratio), rel=5e-7, abs=1.2e-38)
    assert got["clipped_low"] == (log_ratio < 0)
    assert got["loss"] == pytest.approx(math.exp(log_ratio) if log_ratio > 0 else 0.8, rel=5e-7)


def test_a_ratio_beyond_fp32_is_infinite_and_clipped(path: Path):
    got = one(path, 100.0, 0.0, 1.0)
    assert (got["ratio_max"], got["clipped_high"], got["d"]) == (INF, 1, 0)
    assert got["loss"] == pytest.approx(-1.28)


@pytest.mark.parametrize("log_ratio", [89.0, 200.0, INF])
def test_an_advantage_of_0_has_no_loss_however_large_the_ratio(path: Path, log_ratio):
    """As a number 0 · inf is NaN, and one such token would spoil a whole mini-batch to which it adds nothing."""
    got = one(path, log_ratio, 0.0, 0.0, 0.5)
    assert (got["loss"], got["d"], got["ratio_max"], got["clipped_low"], got["clipped_high"]) == (0, 0, INF, 0, 0)
    got = one(path, log_ratio, 0.0, -0.0, 0.5)
    assert (got["loss"], got["d"]) == (0, 0)
    got = one(path, log_ratio, 0.0, -1.0, 0.5)
    assert (got["loss"], got["d"]) == (INF, INF), "what has an advantage is not hidden"


def test_an_advantage_of_0_hides_no_nan(path: Path):
    got = one(path, NAN, 0.0, 0.0)
    assert math.isnan(got["loss"])
    assert math.isnan(got["d"])


def test_clip_bounds_are_inside(path: Path):
    """A ratio equal to a bound is not clipped, and where both arms are equal the gradient is the free one's."""
    for log_ratio, clips in ((-0.25, lambda r: (1 - r, 0.0)), (0.25, lambda r: (0.0, r - 1))):
        clip_low, clip_high = clips(one(path, log_ratio, 0.0, 1.0)["ratio_max"])
        for advantage in (1.0, -1.0):
            got = one(path, log_ratio, 0.0, advantage, clip_low=clip_low, clip_high=clip_high)
            assert got["clipped_low"] == got["clipped_high"] == 0
            assert got["d"] == pytest.approx(-math.exp(log_ratio) * advantage)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (-1.0, -2.0, 1.6, 0.0, 1, 0),  # too low already, and to be lowered: the clip holds
        (-1.0, 2.0, -2 * math.exp(-1), -2 * math.exp(-1), 0, 0),
        (1.0, 2.0, -2.56, 0.0, 0, 1),
        (1.0, -2.0, 2 * math.exp(1), 2 * math.exp(1), 0, 0),
        (1.0, 0.0, 0.0, 0.0, 0, 0),
        (0.0, 3.0, -3.0, -3.0, 0, 0),
        (-0.24, -1.0, 0.8, 0.0, 1, 0),  # inside a clip of 0.28, outside one of 0.2
        (0.23, 1.0, -math.exp(0.23), -math.exp(0.23), 0, 0),
    ],
)
def test_each_side_of_the_clip(path: Path, log_ratio, advantage, loss, slope, low, high):
    got = one(path, log_ratio, 0.0, advantage, 0.5)
    assert got["loss"] == pytest.approx(0.5 * loss, rel=1e-6)
    assert got["d"] == pytest.approx(0.5 * slope, rel=1e-6)
    assert (got["clipped_low"], got["clipped_high"]) == (low, high)


def test_the_pull_of_the_reference(path: Path):
    """d k3 / d log p = 1 - exp(log q - log p), times coefficient and weight; below the reference it pushes up."""
    for gap in (-2.0, -0.1, 0.3, 2.0):
        got = one(path, -1.0, -1.0, 0.0, 0.5, ref=-1.0 + gap, kl_coefficient=0.2)
        assert got["d"] == pytest.approx(0.5 * 0.2 * -math.expm1(gap), rel=2e-6)
        assert got["loss"] == pytest.approx(0.5 * 0.2 * (math.expm1(gap) - gap), rel=2e-6)


@pytest.mark.parametrize("where", ["logprob", "old", "advantage", "weight", "ref"])
def test_nan_of_a_token_that_takes_part_is_seen(path: Path, where):
    values = {"logprob": -1.0, "old": -1.1, "advantage": 1.0, "weight": 1.0, "ref": -1.2} | {where: NAN}
    got = one(path, **values, kl_coefficient=0.1)
    seen = {"loss", "d"} | ({"kl_sum", "ratio_max", "ratio_min"} if where in ("logprob", "old") else set())
    assert all(math.isnan(got[name]) for name in seen)


@pytest.mark.parametrize("column", [0, 5000, 8999])
def test_nan_is_kept_whatever_comes_before_and_after(path: Path, column):
    tokens_T = (torch.zeros(9000), torch.zeros(9000), torch.ones(9000), torch.ones(9000))
    tokens_T[0][column] = NAN
    got = solved(path, tokens_T)
    assert all(getattr(got, name).isnan() for name in ("loss", "kl_sum", "ratio_max", "ratio_min"))
    assert got.d_logprob_T.isnan().nonzero().tolist() == [[column]]


@pytest.mark.parametrize("tokens", [0, 1, 5000])
def test_nothing_takes_part(path: Path, tokens):
    tokens_T = (*torch.full((3, tokens), NAN), torch.zeros(tokens))
    got = solved(path, tokens_T, ref_logprob_T=torch.full((tokens,), INF), kl_coefficient=0.5)
    assert {name: getattr(got, name).item() for name in SUMS} == NOTHING
    assert got.d_logprob_T.tolist() == [0.0] * tokens


def test_strided_inputs_are_the_same_numbers(path: Path):
    wide_N4 = torch.randn(10, 4, generator=torch.Generator().manual_seed(3)).abs().neg()
    got, want = (solved(path, tuple(columns)) for columns in (wide_N4.t(), wide_N4.t().contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = solved(path, (*wide_N4.t()[:3], torch.ones(()).expand(10)))
    assert torch.equal(expanded.loss, solved(path, (*wide_N4.t()[:3], torch.ones(10))).loss)


@pytest.mark.parametrize("name", ["old_logprob_T", "advantage_T", "weight_T", "ref_logprob_T"])
def test_a_shape_that_does_not_fit_is_named(path: Path, name):
    tensors = {field: path.place(torch.zeros(3)) for field in ("old_logprob_T", "advantage_T", "weight_T")}
    for shape in ((4,), (3, 1), ()):
        with pytest.raises(ValueError, match=rf"{name}: expected \[3\] as logprob_T"):
            clipped_policy_loss(
                path.place(torch.zeros(3)), **tensors | {name: path.place(torch.zeros(shape))}, clip_low=0.2, clip_high=0.2
            )
