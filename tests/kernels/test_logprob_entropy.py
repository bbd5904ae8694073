"""logprob_entropy against fp64: values and gradients, for every instruction set of this processor and for plain PyTorch.

The criterion. `exact` is `reference.logprob_entropy` in fp64 on the same logits; `naive` is what one would write with
torch.log_softmax in fp32 (and autograd). A value may be off by 1.5 times the largest error of naive over the rows, plus
1e-7 · max(1, |exact|): an fp32 result of magnitude 8 cannot be nearer than 5e-7, and naive may be exact by luck. A gradient may
be off by the largest error of naive, plus 4 fp32 roundings of the largest term that goes into it and one rounding to the
logits' dtype. Where p_y is near 1 naive is worthless, and a test of its own asks for a RELATIVE error below 5e-7. Plain PyTorch
rounds to fp32 more often on its way and gets 1e-6 and, where p_y is near 1, 1e-5.
"""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.logprob_entropy as module
from kernels import backend, reference
from kernels.logprob_entropy import logprob_entropy, logprob_entropy_backward_, logprob_entropy_forward

NATIVE = backend.loss_path() == "native"
CAPABILITIES = torch.ops.keju.cpu_capabilities() if NATIVE else []
INF = float("inf")


@pytest.fixture(params=[*CAPABILITIES, "plain"], scope="module")
def path(request):
    """Every way the CPU can compute it: each instruction set, and plain PyTorch."""
    patch = pytest.MonkeyPatch()
    if request.param == "plain":
        patch.setattr(module, "_is_native", lambda _logits_TV: False)
    else:
        torch.ops.keju.set_cpu_capability(request.param)
    yield request.param
    patch.undo()
    if NATIVE:
        torch.ops.keju.set_cpu_capability(CAPABILITIES[-1])


def naive(logits_TV: Tensor, labels_T: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """In fp32 with log_softmax; ignored rows as in the definition, for the comparison's sake."""
    temperature = temperature.float().unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    log_p_TV = (logits_TV.float() / temperature).log_softmax(1)
    kept_T = (labels_T != reference.IGNORE).float()
    logprob_T = log_p_TV.gather(1, labels_T.clamp_min(0).unsqueeze(1)).squeeze(1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == -INF, 0)).sum(1)
    return torch.where(kept_T == 1, logprob_T, 0), entropy_T * kept_T


def gradient(function, logits_TV: Tensor, labels_T: Tensor, temperature, d_logprob_T: Tensor, d_entropy_T: Tensor) -> Tensor:
    leaf_TV = logits_TV.detach().requires_grad_()
    logprob_T, entropy_T = function(leaf_TV, labels_T, temperature)
    torch.autograd.backward((logprob_T, entropy_T), (d_logprob_T.to(logprob_T.dtype), d_entropy_T.to(entropy_T.dtype)))
    return leaf_TV.grad


def error(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact|, 0 where both are the same infinity."""
    return torch.where(got.double() == exact, 0, (got.double() - exact).abs())


def with_strides(logits_TV: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory."""
    rows, vocabulary = logits_TV.shape
    if layout == "columns":
        return logits_TV.t().contiguous().t()
    if layout == "rows":
        wide = logits_TV.new_full((rows, vocabulary + 5), float("nan"))
        wide[:, 3 : 3 + vocabulary] = logits_TV
        return wide[:, 3 : 3 + vocabulary]
    return logits_TV


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float | Tensor, Tensor, Tensor]:
    """(logits_TV, labels_T, temperature, d_logprob_T, d_entropy_T). The label's logit and one other of each row are finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    rows = draw(st.integers(1, 4))
    vocabulary = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 1023, 1024, 1025, 1100, 2048, 3333])))
    scale = draw(st.sampled_from([1e-4, 1.0, 4.0, 30.0, 1e3, 1e6]))
    logits_TV = torch.randn(rows, vocabulary, generator=generator) * scale + draw(st.sampled_from([0.0, 50.0, -3e3]))
    labels_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    hidden = draw(st.sampled_from(["none", "scattered", "head", "tail", "all but two"]))
    masked_TV = {
        "none": torch.zeros(rows, vocabulary),
        "scattered": torch.rand(rows, vocabulary, generator=generator) < 0.5,
        "head": (torch.arange(vocabulary) < vocabulary * 2 // 3).expand(rows, -1),
        "tail": (torch.arange(vocabulary) > vocabulary // 3).expand(rows, -1),
        "all but two": torch.ones(rows, vocabulary),
    }[hidden].bool()
    kept_T2 = torch.stack((labels_T, (labels_T * 7 + 1) % vocabulary), 1)
    logits_TV = torch.where(masked_TV.scatter(1, kept_T2, False), -INF, logits_TV)
    labels_T = torch.where(torch.rand(rows, generator=generator) < 0.15, reference.IGNORE, labels_T)
    temperature = draw(st.sampled_from([1.0, 0.6, 0.7, 1.3, 0.01, 20.0, "per row"]))
    if temperature == "per row":
        temperature = torch.rand(rows, generator=generator) * 2 + 0.05
    logits_TV = logits_TV.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    layout = draw(st.sampled_from(["plain", "rows", "columns"]))
    d_logprob_T, d_entropy_T = torch.randn(2, rows, generator=generator)
    return with_strides(logits_TV, layout), labels_T, temperature, d_logprob_T, d_entropy_T


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_values_are_as_good_as_log_softmax(path, problem):
    logits_TV, labels_T, temperature, _, _ = problem
    exact = reference.logprob_entropy(logits_TV.double(), labels_T, temperature)
    ours = logprob_entropy(logits_TV, labels_T, temperature)
    rounding = 1e-6 if path == "plain" else 1e-7
    for got, want, plain, name in zip(ours, exact, naive(*problem[:3]), ("logprob", "entropy"), strict=True):
        assert got.dtype == torch.float32
        allowed = 1.5 * error(plain, want).max() + rounding * want.abs().clamp_min(1)
        assert (error(got, want) <= allowed).all(), f"{name}: {got} for {want}, naive {plain}"
    assert (ours[0] <= 0).all()
    assert (ours[1] >= 0).all()


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_gradients_are_as_good_as_autograd(path, problem):
    logits_TV, labels_T, temperature, d_logprob_T, d_entropy_T = problem
    want = gradient(exact_gradient_path, logits_TV.double(), *problem[1:])
    got = gradient(logprob_entropy, *problem)
    assert got.dtype == logits_TV.dtype
    assert not got.isnan().any()
    entropy_T = reference.logprob_entropy(logits_TV.double(), labels_T, temperature)[1]
    term_T = (d_logprob_T.abs() + d_entropy_T.abs() * (1 + entropy_T)) / temperature
    rounding_TV = torch.finfo(logits_TV.dtype).eps / 2 * want.abs()
    allowed_TV = error(gradient(naive, *problem), want).max() + 4 * 2.0**-24 * term_T.unsqueeze(1) + rounding_TV
    assert (error(got, want) <= allowed_TV).all()
    assert (got[labels_T == reference.IGNORE] == 0).all()
    assert (got[logits_TV == -INF] == 0).all()


def exact_gradient_path(logits_TV: Tensor, labels_T: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """In fp64 with large finite logits for -inf, whose autograd through logsumexp would otherwise be NaN; the same gradient."""
    shift = 1e9 * (1 + logits_TV.detach().masked_fill(logits_TV == -INF, 0).abs().max())
    finite_TV = torch.where(logits_TV == -INF, -shift, logits_TV)
    return reference.logprob_entropy(finite_TV, labels_T, temperature)


@pytest.mark.parametrize("gap", [1.0, 8.0, 20.0, 60.0])
@pytest.mark.parametrize("vocabulary", [2, 1000, 5000])
def test_a_near_certain_label_keeps_relative_accuracy(path, gap, vocabulary):
    """log p_y, H and 1 - p_y are tiny there; computed from p_y rounded to fp32 they would be 0 or noise."""
    logits_TV = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1))
    labels_T = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    logits_TV[torch.arange(3), labels_T] = logits_TV.max() + gap
    exact = reference.logprob_entropy(logits_TV.double(), labels_T)
    ours = logprob_entropy(logits_TV, labels_T)
    assert (ours[0] < 0).all()
    tolerance = 1e-5 if path == "plain" else 5e-7
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=tolerance, atol=0)
    # H of plain PyTorch has no such accuracy, nor has at 60 even the definition in fp64.
    if path != "plain" and gap < 60:
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=5e-7, atol=0)
    arrives = (torch.ones(3), torch.zeros(3))
    d_label_T = gradient(logprob_entropy, logits_TV, labels_T, 1.0, *arrives)[torch.arange(3), labels_T]
    torch.testing.assert_close(d_label_T.double(), -torch.expm1(exact[0]), rtol=2 * tolerance, atol=0)


def test_infinities(path):
    """A first block of -inf, a label of probability 0, a certain label, and NaN and +inf, which must not be hidden."""
    logits_TV = torch.full((5, 3000), -INF)
    logits_TV[:3, 2500] = torch.tensor([2.0, 3.0, -1e4])
    logits_TV[:3, 2700] = torch.tensor([2.0, 3.0, -INF])
    logits_TV[3, 5], logits_TV[3, 9] = float("nan"), 0.0
    logits_TV[4, 2500] = INF
    labels_T = torch.tensor([2500, 0, 2500, 9, 9])
    logprob_T, entropy_T = logprob_entropy(logits_TV[:3], labels_T[:3], 0.5)
    torch.testing.assert_close(logprob_T, torch.tensor([-math.log(2), -INF, 0.0]))
    torch.testing.assert_close(entropy_T, torch.tensor([math.log(2), math.log(2), 0.0]))
    d_logits_TV = gradient(logprob_entropy, logits_TV[:3], labels_T[:3], 0.5, torch.ones(3), torch.ones(3))
    expected_TV = torch.zeros(3, 3000)
    expected_TV[0, 2500], expected_TV[0, 2700] = 1.0, -1.0
    expected_TV[1, 0], expected_TV[1, 2500], expected_TV[1, 2700] = 2.0, -1.0, -1.0
    torch.testing.assert_close(d_logits_TV, expected_TV)
    for logits_V, label in zip(logits_TV[3:], labels_T[3:], strict=True):
        assert logprob_entropy(logits_V[None], label[None])[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(path, dtype):
    generator = torch.Generator().manual_seed(2)
    logits_TV = (torch.randn(37, 9001, generator=generator) * 5).to(dtype)
    labels_T = torch.randint(0, 9001, (37,), generator=generator)
    arrives = torch.randn(2, 37, generator=generator)
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(
                (*logprob_entropy(logits_TV, labels_T, 0.8), gradient(logprob_entropy, logits_TV, labels_T, 0.8, *arrives))
            )
    finally:
        torch.set_num_threads(threads)
    if path != "plain":  # torch divides some reductions by thread; ours never
        for outcome in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


def test_a_label_or_temperature_out_of_range_is_an_error(path):
    logits_TV = torch.zeros(2, 7)
    for label in (7, -1, -101):
        with pytest.raises(ValueError, match="labels_T"):
            logprob_entropy(logits_TV, torch.tensor([0, label]))
    for temperature in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="temperature"):
            logprob_entropy(logits_TV, torch.tensor([0, 1]), temperature)
    with pytest.raises(ValueError, match="temperature"):
        logprob_entropy(logits_TV, torch.tensor([0, 1]), torch.ones(3))
    with pytest.raises(ValueError, match="labels_T"):
        logprob_entropy(logits_TV, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="logits_TV"):
        logprob_entropy(logits_TV.long(), torch.tensor([0, 1]))


def test_no_rows(path):
    logprob_T, entropy_T = logprob_entropy(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))
    assert logprob_T.shape == entropy_T.shape == (0,)


@pytest.mark.skipif(not NATIVE, reason="kernels._native is not built")
def test_offsets_beyond_32_bits():
    """Two bf16 rows 2^31 + 8 elements apart. Only the pages that hold them are ever touched."""
    try:
        memory = torch.empty(2**31 + 8 + 1000, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    logits_TV = memory.as_strided((2, 1000), (2**31 + 8, 1))
    logits_TV.copy_(torch.randn(2, 1000))
    compact_TV, labels_T = logits_TV.clone(), torch.tensor([3, 999])
    logprob_T, _, saved_3T = logprob_entropy_forward(logits_TV, labels_T)
    assert torch.equal(logprob_T, logprob_entropy(compact_TV, labels_T)[0])
    arrives = torch.ones(2, 2)
    logprob_entropy_backward_(logits_TV, labels_T, 1.0, logprob_T, saved_3T, *arrives)
    assert torch.equal(logits_TV, gradient(logprob_entropy, compact_TV, labels_T, 1.0, *arrives))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "rows"])
def test_inplace_backward_overwrites_the_logits_with_the_same_gradient(path, dtype, layout):
    logits_TV = with_strides(torch.randn(4, 1500).to(dtype), layout)
    labels_T = torch.tensor([0, 1499, reference.IGNORE, 700])
    arrives = torch.randn(2, 4)
    want_TV = gradient(logprob_entropy, logits_TV, labels_T, 0.9, *arrives)

    source_TV = logits_TV.clone().requires_grad_()
    middle_TV = with_strides(source_TV * 1, layout)
    outputs = logprob_entropy(middle_TV, labels_T, 0.9, inplace_backward=True)
    arrived = tuple(arrives.to(outputs[0].dtype))
    torch.autograd.backward(outputs, arrived, retain_graph=True)
    assert torch.equal(source_TV.grad, want_TV)
    assert torch.equal(middle_TV.detach(), want_TV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, arrived)

    logprob_T, _, saved_3T = logprob_entropy_forward(logits_TV, labels_T, 0.9)
    assert logprob_entropy_backward_(logits_TV, labels_T, 0.9, logprob_T, saved_3T, *arrived) is logits_TV
    assert torch.equal(logits_TV, want_TV)


def test_inplace_backward_refuses_what_it_cannot_overwrite(path):
    labels_T = torch.tensor([0, 1])
    for logits_TV in (torch.randn(5, 2).t(), torch.randn(1, 5).expand(2, 5)):
        with pytest.raises(ValueError, match="logits_TV"):
            logprob_entropy(logits_TV, labels_T, inplace_backward=True)


def test_one_output_alone_is_differentiable(path):
    logits_TV, labels_T = torch.randn(3, 50), torch.tensor([1, 2, 3])
    for index in (0, 1):
        ours, exact = logits_TV.clone().requires_grad_(), logits_TV.double().requires_grad_()
        logprob_entropy(ours, labels_T)[index].sum().backward()
        reference.logprob_entropy(exact, labels_T)[index].sum().backward()
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)])
def test_gradcheck_in_fp64(temperature):
    logits_TV = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels_T = torch.tensor([4, reference.IGNORE, 10])
    assert torch.autograd.gradcheck(lambda logits_TV: logprob_entropy(logits_TV, labels_T, temperature), (logits_TV,))
    ours, exact = logprob_entropy(logits_TV, labels_T, temperature), reference.logprob_entropy(logits_TV, labels_T, temperature)
    torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)


def test_fake_tensors_and_the_compiler_see_the_operation():
    arguments = (torch.randn(3, 40, requires_grad=True), torch.tensor([0, 5, -100]), torch.ones(1, dtype=torch.float64))
    torch.library.opcheck(torch.ops.keju.logprob_entropy_forward, (*arguments, False))
    with FakeTensorMode():
        outputs = logprob_entropy(torch.empty(8, 152064, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.long), 0.7)
        assert [(tuple(o.shape), o.dtype) for o in outputs] == [((8,), torch.float32)] * 2

    def loss(logits_TV: Tensor) -> Tensor:
        logprob_T, entropy_T = logprob_entropy(logits_TV * 2, arguments[1], 0.7, inplace_backward=True)
        return (logprob_T + 0.5 * entropy_T).sum()

    (eager,) = torch.autograd.grad(loss(arguments[0]), arguments[0])
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(arguments[0]), arguments[0])
    assert torch.equal(eager, compiled)


@pytest.mark.skipif(not NATIVE, reason="kernels._native is not built")
def test_vector_exp_is_within_two_ulp(path):
    if path == "plain":
        pytest.skip("torch's own exp")
    x = -torch.cat((torch.linspace(0, 87.3, 999936), torch.rand(64) * 1e-6))
    got, exact = torch.ops.keju.exp_nonpositive(x), x.double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert ((got.double() - exact).abs() / ulp).max() <= 2
    special = torch.full((64,), -INF)
    special[:3] = torch.tensor([0.0, float("nan"), -88.1])
    got = torch.ops.keju.exp_nonpositive(special)
    assert got[0] == 1
    assert got[1].isnan()
    assert (got[2:] == 0).all()


@pytest.mark.skipif(not NATIVE, reason="kernels._native is not built")
def test_an_instruction_set_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="avx1024"):
        torch.ops.keju.set_cpu_capability("avx1024")
    assert torch.ops.keju.cpu_capability() == CAPABILITIES[-1]


def test_falling_back_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels._native", None)
    backend.loss_path.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="kernels._native cannot be loaded"):
            assert backend.loss_path() == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logprob_entropy(torch.zeros(1, 3), torch.tensor([0]))
    finally:
        backend.loss_path.cache_clear()
