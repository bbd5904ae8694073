"""The native clipped policy loss against the reference in fp64: sums, extremes and gradient.

Each token is fp32 arithmetic of a handful of operations, each sum fp64, so a sum may be off by a few fp32 roundings of the sum of
its terms' magnitudes, and a gradient by a few of its own. Inputs are such that no ratio lies within rounding of a clip bound,
where fp32 and fp64 may well decide differently; the bounds have a test of their own, in which fp32 is exact.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, reference

pytestmark = pytest.mark.skipif(backend.loss_path() != "native", reason="the native kernels are not built or not chosen")

INF, NAN = float("inf"), float("nan")
NAMES = ("loss", "clipped_low", "clipped_high", "kl_sum", "ref_kl_sum", "ratio_max", "ratio_min")


def native(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ref_logprob_T: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[dict[str, float], Tensor]:
    arguments = (logprob_T, old_logprob_T, advantage_T, weight_T, clip_low, clip_high, ref_logprob_T, kl_coefficient)
    sums_7, d_logprob_T = torch.ops.keju.clipped_policy_loss_native(*arguments)
    assert sums_7.dtype == d_logprob_T.dtype == torch.float32
    return dict(zip(NAMES, sums_7.tolist(), strict=True)), d_logprob_T


def one(logprob: float, old: float, advantage: float, weight: float = 1.0, **options) -> tuple[dict[str, float], float]:
    """One token."""
    if "ref" in options:
        options["ref_logprob_T"] = torch.tensor([options.pop("ref")])
    sums, d_logprob_T = native(*(torch.tensor([value]) for value in (logprob, old, advantage, weight)), **options)
    return sums, d_logprob_T.item()


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], dict]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    tokens = draw(st.one_of(st.integers(0, 50), st.sampled_from([4095, 4096, 4097, 10000])))
    clip_low, clip_high = draw(st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.5), (1.0, 9.0)]))
    logprob_T = -torch.rand(tokens, generator=generator) * 10
    moved_T = torch.randn(tokens, generator=generator) * draw(st.sampled_from([1e-5, 1e-2, 0.3, 3.0, 20.0]))
    moved_T = moved_T.clamp(max=80.0)  # from about 84 on ratio · advantage is beyond fp32, which fp64 then does not show
    ratio_T = (logprob_T - (logprob_T - moved_T)).double().exp()
    for bound in (1 - clip_low, 1 + clip_high):
        moved_T = torch.where((ratio_T / max(bound, 1e-9) - 1).abs() < 1e-5, 0.05, moved_T)
    advantage_T = torch.randn(tokens, generator=generator) * draw(st.sampled_from([0.0, 1.0, 50.0]))
    weight_T = torch.rand(tokens, generator=generator) * draw(st.sampled_from([0.0, 1e-3, 1.0]))
    left_out_T = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    old_logprob_T = logprob_T - moved_T
    if draw(st.booleans()):
        ref_logprob_T = logprob_T + torch.randn(tokens, generator=generator) * draw(st.sampled_from([1e-4, 0.5, 5.0]))
    else:
        ref_logprob_T = None
    weight_T = weight_T.masked_fill(left_out_T, 0)
    junk = draw(st.sampled_from([NAN, INF, -INF]))
    logprob_T, old_logprob_T, advantage_T = (
        tensor.masked_fill(weight_T == 0, junk) for tensor in (logprob_T, old_logprob_T, advantage_T)
    )
    options = {"clip_low": clip_low, "clip_high": clip_high, "kl_coefficient": draw(st.sampled_from([0.0, 0.1, 3.0]))}
    return (logprob_T, old_logprob_T, advantage_T, weight_T), options | {"ref_logprob_T": ref_logprob_T}


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_agrees_with_the_reference_in_fp64(problem):
    inputs, options = problem
    ref_logprob_T = options["ref_logprob_T"]
    sums, d_logprob_T = native(*inputs, **options)
    # The differences are taken in fp32, as the kernel's are: what is tested is what follows from them.
    logprob_T, old_logprob_T, advantage_T, weight_T = inputs
    zero_T = torch.zeros_like(weight_T, dtype=torch.float64)
    log_ratio_T = (logprob_T - old_logprob_T).double()
    exact = {"clip_low": options["clip_low"], "clip_high": options["clip_high"]}
    gap_T = None if ref_logprob_T is None else (ref_logprob_T - logprob_T).double()
    active_T = weight_T != 0
    policy = reference.clipped_policy_loss(log_ratio_T, zero_T, advantage_T.double(), weight_T.double(), **exact)
    loss, d_exact_T, size = policy.loss, policy.d_logprob_T, (policy.d_logprob_T.abs().sum() + policy.loss.abs())
    size_T = d_exact_T.abs()
    ref_kl = torch.zeros((), dtype=torch.float64)
    if gap_T is not None:
        k3_T = torch.where(active_T, reference.k3(gap_T), 0)
        ref_kl = k3_T.sum()
        kl_T = weight_T.double() * options["kl_coefficient"]
        loss = loss + (kl_T * k3_T).sum()
        size = size + (kl_T * k3_T).sum()
        slope_T = torch.where(active_T, kl_T * torch.expm1(gap_T), 0)
        d_exact_T, size_T = d_exact_T - slope_T, size_T + slope_T.abs()
    # Clipped tokens add to the loss what they do not add to the gradient: bounded by |A| times the bound or the ratio.
    held_T = torch.where(active_T, weight_T * advantage_T.abs() * (1 + options["clip_high"]), 0).double().sum()
    assert abs(sums["loss"] - loss.item()) <= 1e-6 * (size + held_T).item() + 1e-30
    assert ((d_logprob_T.double() - d_exact_T).abs() <= 1e-6 * size_T + 1e-37).all()
    assert sums["clipped_low"] == policy.clipped_low.item()
    assert sums["clipped_high"] == policy.clipped_high.item()
    # Sums come back in fp32, in which what is greater than 3.4e38 is infinite.
    assert sums["kl_sum"] == pytest.approx(policy.kl_sum.float().item(), rel=1e-6, abs=1e-37)
    assert sums["ref_kl_sum"] == pytest.approx(ref_kl.float().item(), rel=1e-6, abs=1e-37)
    assert sums["ratio_max"] == pytest.approx(policy.ratio_max.item(), rel=3e-7)
    assert sums["ratio_min"] == pytest.approx(policy.ratio_min.item(), rel=3e-7)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_agrees_with_the_reference_as_called(problem):
    """Without the detour over differences: the same call to both, in fp32."""
    inputs, options = problem
    sums, d_logprob_T = native(*inputs, **options)
    plain = reference.clipped_policy_loss(*inputs, **options)
    for name in ("clipped_low", "clipped_high", "ratio_max", "ratio_min"):
        assert sums[name] == pytest.approx(getattr(plain, name).item(), rel=3e-7), name
    torch.testing.assert_close(d_logprob_T, plain.d_logprob_T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(sums["loss"]), plain.loss, rtol=1e-4, atol=1e-3 * (1 + plain.d_logprob_T.abs().sum()))


@pytest.mark.parametrize("tokens", [1, 4096, 4097, 50_000])
def test_bitwise_the_same_for_any_number_of_threads(tokens):
    """On a loss whose terms cancel: its value is what fp64 rounded away, so it tells in which order the sum was taken."""
    generator = torch.Generator().manual_seed(1)
    logprob_T, ref_logprob_T = torch.randn(2, tokens, generator=generator)
    wide_T = torch.randn(tokens, generator=generator) * 10 ** (torch.rand(tokens, generator=generator) * 20 - 10)
    half = tokens // 2
    advantage_T = torch.cat((wide_T[:half], -wide_T[:half].flip(0), wide_T[2 * half :]))
    weight_T = torch.ones(tokens)
    before = torch.get_num_threads()
    try:
        got = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            arguments = (logprob_T, logprob_T, advantage_T, weight_T, 0.2, 0.28, ref_logprob_T, 0.0)
            got.append(torch.ops.keju.clipped_policy_loss_native(*arguments))
    finally:
        torch.set_num_threads(before)
    for sums_7, d_logprob_T in got[1:]:
        assert torch.equal(sums_7, got[0][0])
        assert torch.equal(d_logprob_T, got[0][1])


@pytest.mark.parametrize("exponent", [-6, -4, -3, -2, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_of_a_small_step_keeps_its_digits(exponent, sign):
    """As exp(x) - 1 - x in fp32 it would have none left below 1e-4."""
    x = sign * 10.0**exponent
    sums, _ = one(x, 0.0, 1.0, ref=2 * x)
    moved = torch.tensor(x).double().item()
    exact = (
        moved * moved * (0.5 + moved / 6 + moved**2 / 24 + moved**3 / 120 + moved**4 / 720 + moved**5 / 5040 + moved**6 / 40320)
    )
    assert sums["kl_sum"] == pytest.approx(exact, rel=3e-7)
    assert sums["ref_kl_sum"] == pytest.approx(exact, rel=3e-7)


def test_clip_bounds_are_inside():
    """A ratio equal to a bound is not clipped, and where both arms are equal the gradient is the free one's."""
    for log_ratio in (-0.25, 0.25):
        ratio = one(log_ratio, 0.0, 1.0)[0]["ratio_max"]
        assert ratio == pytest.approx(math.exp(log_ratio), rel=2e-7)
        for advantage in (1.0, -1.0):
            sums, d_logprob = one(log_ratio, 0.0, advantage, clip_low=max(1 - ratio, 0), clip_high=max(ratio - 1, 0))
            assert sums["clipped_low"] == sums["clipped_high"] == 0
            assert d_logprob == -ratio * advantage


@pytest.mark.parametrize("where", ["logprob", "old", "advantage", "weight", "ref"])
def test_nan_of_a_token_that_takes_part_is_seen(where):
    values = {"logprob": -1.0, "old": -1.1, "advantage": 1.0, "weight": 1.0, "ref": -1.2} | {where: NAN}
    sums, d_logprob = one(**values, kl_coefficient=0.1)
    assert math.isnan(sums["loss"])
    assert math.isnan(d_logprob)
    if where in ("logprob", "old"):
        assert math.isnan(sums["kl_sum"])
        assert math.isnan(sums["ratio_max"])
        assert math.isnan(sums["ratio_min"])


def test_a_ratio_of_0_times_an_infinite_advantage_is_seen():
    """The free arm alone is NaN: the larger of the two arms is not to be the other one."""
    sums, d_logprob = one(-200.0, 0.0, INF)
    assert math.isnan(sums["loss"])
    assert math.isnan(d_logprob)


def test_nan_is_kept_whatever_comes_before_and_after():
    tokens = 9000
    inputs = [torch.zeros(tokens), torch.zeros(tokens), torch.ones(tokens), torch.ones(tokens)]
    inputs[0][5000] = NAN
    sums, d_logprob_T = native(*inputs)
    assert all(math.isnan(sums[name]) for name in ("loss", "kl_sum", "ratio_max", "ratio_min"))
    assert d_logprob_T.isnan().nonzero().tolist() == [[5000]]


def test_an_infinite_gap_without_a_coefficient_is_only_a_metric():
    sums, d_logprob = one(-1.0, -1.0, 1.0, ref=-INF)
    assert (sums["loss"], d_logprob, sums["ref_kl_sum"]) == (-1.0, -1.0, INF)


@pytest.mark.parametrize("tokens", [0, 1, 5000])
def test_nothing_takes_part(tokens):
    sums, d_logprob_T = native(*torch.full((3, tokens), NAN), torch.zeros(tokens), ref_logprob_T=torch.full((tokens,), INF))
    assert sums == dict.fromkeys(NAMES, 0.0) | {"ratio_max": -INF, "ratio_min": INF}
    assert d_logprob_T.tolist() == [0.0] * tokens


def test_strided_inputs_are_the_same_numbers():
    wide_TN = torch.randn(10, 4)
    got = native(*wide_TN.t().abs().neg())
    want = native(*wide_TN.t().abs().neg().contiguous())
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    assert native(wide_TN[:, 0], wide_TN[:, 1], wide_TN[:, 2], torch.ones(()).expand(10))[0]["ratio_max"] > 0


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({0: torch.zeros(3, 1)}, ValueError, r"logprob_T: expected \[T\]"),
        ({1: torch.zeros(4)}, ValueError, r"old_logprob_T: expected \[3\]"),
        ({2: torch.zeros(3).double()}, TypeError, "advantage_T: expected float32"),
        ({3: torch.zeros(3, 1)}, ValueError, r"weight_T: expected \[3\]"),
        ({4: -0.1}, ValueError, "clip_low: expected at least 0"),
        ({5: NAN}, ValueError, "clip_high: expected at least 0"),
        ({6: torch.zeros(2)}, ValueError, r"ref_logprob_T: expected \[3\]"),
        ({7: INF}, ValueError, "kl_coefficient: expected a finite number"),
    ],
)
def test_bad_arguments_are_named(changed, error, words):
    arguments = [torch.zeros(3)] * 4 + [0.2, 0.2, None, 0.0]
    for index, value in changed.items():
        arguments[index] = value
    with pytest.raises(error, match=words):
        torch.ops.keju.clipped_policy_loss_native(*arguments)
