"""logprob_entropy against fp64: values and gradients, for every way to compute it.

The criterion. `exact` is `reference.logprob_entropy` in fp64 on the same logits; `naive` is what one would write with
torch.log_softmax in fp32 (and autograd). A value may be off by 1.5 times the largest error of naive over the rows, plus FLOOR ·
max(1, |exact|): naive may be exact by luck, and an fp32 result of magnitude 8 cannot be nearer than 5e-7. A gradient may be off
by the largest error of naive, plus 4 fp32 roundings of the largest term that goes into it and one rounding to the logits' dtype.
Where p_y is near 1 naive is worthless, and a test of its own asks for a RELATIVE error below CERTAIN. The CPU's and the CUDA C++
closing formulas are fp64; Triton's are fp32, and plain PyTorch rounds to fp32 more often on its way.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from kernel_paths import CAPABILITIES, NATIVE, Path
from logits_problems import INF, Problem, error, exact_for_gradients, gradient, naive, problems, with_layout

from kernels import reference
from kernels.logprob_entropy import logprob_entropy

FLOOR = {"native": 1e-7, "cuda": 3e-7, "triton": 3e-7, "reference": 2e-6}
CERTAIN = {"native": 5e-7, "cuda": 1e-6, "triton": 1e-6, "reference": 1e-5}


def implementation(path: Path, dtype: torch.dtype) -> str:
    """What really runs: the CPU's kernels leave fp16 to plain PyTorch."""
    return "reference" if path.backend == "native" and dtype == torch.float16 else path.backend


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_values_are_as_good_as_log_softmax(path: Path, problem: Problem):
    logits_TV, labels_T, temperature, _, _ = problem
    exact = reference.logprob_entropy(logits_TV.double(), labels_T, temperature)
    ours = [value_T.cpu() for value_T in logprob_entropy(*path.place(problem[:3]))]
    floor = FLOOR[implementation(path, logits_TV.dtype)]
    for got, want, plain, name in zip(ours, exact, naive(*problem[:3]), ("logprob", "entropy"), strict=True):
        assert got.dtype == torch.float32
        allowed = 1.5 * error(plain, want).max() + floor * want.abs().clamp_min(1)
        assert (error(got, want) <= allowed).all(), f"{name}: {got} for {want}, naive {plain}"
    assert (ours[0] <= 0).all()
    assert (ours[1] >= 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_gradients_are_as_good_as_autograd(path: Path, problem: Problem):
    logits_TV, labels_T, temperature, d_logprob_T, d_entropy_T = problem
    want = gradient(exact_for_gradients, logits_TV.double(), *problem[1:])
    got = gradient(logprob_entropy, *path.place(problem))
    assert got.dtype == logits_TV.dtype
    assert not got.isnan().any()
    entropy_T = reference.logprob_entropy(logits_TV.double(), labels_T, temperature)[1]
    term_T = (d_logprob_T.abs() + d_entropy_T.abs() * (1 + entropy_T)) / temperature
    smallest = torch.finfo(logits_TV.dtype).smallest_normal * torch.finfo(logits_TV.dtype).eps
    rounding_TV = torch.finfo(logits_TV.dtype).eps / 2 * want.abs() + smallest
    allowed_TV = error(gradient(naive, *problem), want).max() + 4 * 2.0**-24 * term_T.unsqueeze(1) + rounding_TV
    assert (error(got, want) <= allowed_TV).all()
    assert (got[labels_T == reference.IGNORE] == 0).all()
    assert (got[logits_TV == -INF] == 0).all()


@pytest.mark.parametrize("gap", [1.0, 8.0, 15.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(2, 1.0), (2, 0.7), (1000, 1.3), (5000, 1.0), (5000, 0.7)])
def test_a_near_certain_label_keeps_relative_accuracy(path: Path, gap: float, vocabulary: int, temperature: float):
    """log p_y, H and 1 - p_y are tiny there; computed from p_y rounded to fp32 they would be 0 or noise. The gap is in nats."""
    logits_TV = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1))
    labels_T = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    logits_TV[torch.arange(3), labels_T] = logits_TV.max() + gap * temperature
    temperature_T = torch.full((3,), temperature)
    exact = reference.logprob_entropy(logits_TV.double(), labels_T, temperature_T)
    logprob_T, entropy_T = logprob_entropy(*path.place((logits_TV, labels_T, temperature_T)))
    assert (logprob_T < 0).all()
    tolerance = CERTAIN[path.backend]
    torch.testing.assert_close(logprob_T.cpu().double(), exact[0], rtol=tolerance, atol=0)
    # H of plain PyTorch has no such accuracy, nor has beyond 30 even the definition in fp64.
    if path.backend != "reference" and gap < 30:
        torch.testing.assert_close(entropy_T.cpu().double(), exact[1], rtol=tolerance, atol=0)
    arrives = (torch.ones(3), torch.zeros(3))
    d_logits_TV = gradient(logprob_entropy, *path.place((logits_TV, labels_T, temperature_T, *arrives)))
    d_label_T = d_logits_TV[torch.arange(3), labels_T].double() * temperature_T
    torch.testing.assert_close(d_label_T, -torch.expm1(exact[0]), rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("shift", [0.0, 300.0, -4000.0])
def test_a_shift_of_all_logits_does_not_show(path: Path, shift: float, temperature: float):
    """The exponents c · x of large logits lose digits to the rounding of c and of c · x; the results must not."""
    logits_TV = torch.randn(4, 3000, generator=torch.Generator().manual_seed(3)).bfloat16().float() + shift
    labels_T = torch.tensor([0, 7, 2500, 2999])
    temperature_T = torch.full((4,), temperature)
    exact = reference.logprob_entropy(logits_TV.double(), labels_T, temperature_T)
    ours = logprob_entropy(*path.place((logits_TV, labels_T, temperature_T)))
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=3e-7 if path.backend != "reference" else 2e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.01, 0.011, 0.013])
def test_exponents_of_a_million(path: Path, temperature: float):
    """c · x of 1.4e6, whose last place is 1/8: what is rounded away is an exponent of its own, not a small correction."""
    logits_TV = torch.full((1, 6), -9984.0).bfloat16()
    logits_TV[0, [0, 3, 4]] = 9984.0
    for labels_T in (torch.tensor([0]), torch.tensor([3])):
        logprob_T, entropy_T = logprob_entropy(*path.place((logits_TV, labels_T)), temperature)
        torch.testing.assert_close(logprob_T.cpu(), torch.tensor([-math.log(3)]), rtol=3e-7, atol=0)
        torch.testing.assert_close(entropy_T.cpu(), torch.tensor([math.log(3)]), rtol=3e-7, atol=0)


def test_infinities(path: Path):
    """A first block of -inf, a label of probability 0, a certain label, and NaN and +inf, which must not be hidden."""
    logits_TV = torch.full((5, 3000), -INF)
    logits_TV[:3, 2500] = torch.tensor([2.0, 3.0, -1e4])
    logits_TV[:3, 2700] = torch.tensor([2.0, 3.0, -INF])
    logits_TV[3, 5], logits_TV[3, 9] = float("nan"), 0.0
    logits_TV[4, 2500] = INF
    labels_T = torch.tensor([2500, 0, 2500, 9, 9])
    logprob_T, entropy_T = logprob_entropy(*path.place((logits_TV[:3], labels_T[:3])), 0.5)
    torch.testing.assert_close(logprob_T.cpu(), torch.tensor([-math.log(2), -INF, 0.0]))
    torch.testing.assert_close(entropy_T.cpu(), torch.tensor([math.log(2), math.log(2), 0.0]))
    problem = (logits_TV[:3], labels_T[:3], 0.5, torch.ones(3), torch.ones(3))
    d_logits_TV = gradient(logprob_entropy, *path.place(problem))
    expected_TV = torch.zeros(3, 3000)
    expected_TV[0, 2500], expected_TV[0, 2700] = 1.0, -1.0
    expected_TV[1, 0], expected_TV[1, 2500], expected_TV[1, 2700] = 2.0, -1.0, -1.0
    torch.testing.assert_close(d_logits_TV, expected_TV)
    for logits_V, label in zip(logits_TV[3:], labels_T[3:], strict=True):
        assert logprob_entropy(*path.place((logits_V[None], label[None])))[1].isnan().all()


@pytest.mark.parametrize("column", [0, 1, 2047, 2048, 2999])
def test_nan_anywhere_is_seen(path: Path, column: int):
    """In the label's own column, in a whole tile, in the ragged last one: no result of that row is a number."""
    logits_TV = torch.randn(2, 3000, generator=torch.Generator().manual_seed(4))
    logits_TV[1, column] = float("nan")
    labels_T = torch.tensor([0, 0])
    for values_T in logprob_entropy(*path.place((logits_TV, labels_T))):
        assert values_T.isnan().tolist() == [False, True]
    arrives = torch.ones(2, 2)
    d_logits_TV = gradient(logprob_entropy, *path.place((logits_TV, labels_T, 1.0, *arrives)))
    assert d_logits_TV.isnan().any(1).tolist() == [False, True]


def test_a_row_of_nothing_but_minus_infinity_is_no_distribution(path: Path):
    for values_T in logprob_entropy(*path.place((torch.full((1, 50), -INF), torch.tensor([3])))):
        assert values_T.isnan().all() or path.backend == "reference"


def test_no_rows(path: Path):
    logprob_T, entropy_T = logprob_entropy(*path.place((torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))))
    assert logprob_T.shape == entropy_T.shape == (0,)


def test_a_vocabulary_of_one_word_is_certain(path: Path):
    problem = (torch.tensor([[3.0], [-7.0]]), torch.tensor([0, 0]), 0.5, torch.ones(2), torch.ones(2))
    for values_T in logprob_entropy(*path.place(problem[:3])):
        assert values_T.tolist() == [0, 0]
    assert (gradient(logprob_entropy, *path.place(problem)) == 0).all()


def test_one_output_alone_is_differentiable(path: Path):
    logits_TV, labels_T = torch.randn(3, 50, generator=torch.Generator().manual_seed(5)), torch.tensor([1, 2, 3])
    for index in (0, 1):
        ours, exact = path.place(logits_TV).clone().requires_grad_(), logits_TV.double().requires_grad_()
        logprob_entropy(ours, path.place(labels_T))[index].sum().backward()
        reference.logprob_entropy(exact, labels_T)[index].sum().backward()
        torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_labels_of_any_integer_type(path: Path, dtype: torch.dtype):
    logits_TV, labels_T = torch.randn(3, 50, generator=torch.Generator().manual_seed(6)), torch.tensor([1, 49, 3])
    want = logprob_entropy(*path.place((logits_TV, labels_T)))
    got = logprob_entropy(*path.place((logits_TV, labels_T.to(dtype))))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["plain", "rows", "columns"])
def test_layout_does_not_change_a_bit(path: Path, layout: str):
    logits_TV, labels_T = torch.randn(3, 2100, generator=torch.Generator().manual_seed(7)), torch.tensor([1, 2099, 3])
    want = logprob_entropy(*path.place((logits_TV, labels_T)), 0.9)
    got = logprob_entropy(*path.place((with_layout(logits_TV, layout), labels_T)), 0.9)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)])
def test_gradcheck_in_fp64(temperature):
    generator = torch.Generator().manual_seed(8)
    logits_TV = torch.randn(3, 11, dtype=torch.float64, generator=generator).requires_grad_()
    labels_T = torch.tensor([4, reference.IGNORE, 10])
    assert torch.autograd.gradcheck(lambda logits_TV: logprob_entropy(logits_TV, labels_T, temperature), (logits_TV,))
    ours, exact = logprob_entropy(logits_TV, labels_T, temperature), reference.logprob_entropy(logits_TV, labels_T, temperature)
    torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_scalar_temperature_that_is_not_positive_is_an_error(path: Path, temperature: float):
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        logprob_entropy(*path.place((torch.zeros(2, 7), torch.tensor([0, 1]))), temperature)


def test_a_value_out_of_range_is_an_error_on_a_cpu(path: Path):
    if path.backend in ("triton", "cuda"):
        pytest.skip("stops the device: test_triton.py, in a process of its own")
    logits_TV = torch.zeros(2, 7)
    for label in (7, -1, -101):
        with pytest.raises(ValueError, match="labels_T"):
            logprob_entropy(logits_TV, torch.tensor([0, label]))
    with pytest.raises(ValueError, match="temperature"):
        logprob_entropy(logits_TV, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))


def test_a_shape_that_does_not_fit_is_an_error(path: Path):
    logits_TV = path.place(torch.zeros(2, 7))
    for labels_T, temperature, words in (
        (torch.tensor([0, 1]), torch.ones(3), r"temperature: expected a scalar or \[2\]"),
        (torch.tensor([0, 1, 2]), 1.0, r"labels_T: expected \[2\]"),
        (torch.tensor([0.0, 1.0]), 1.0, r"labels_T: expected \[2\] integer"),
    ):
        with pytest.raises(ValueError, match=words):
            logprob_entropy(logits_TV, *path.place((labels_T, temperature)))
    for wrong in (logits_TV.long(), logits_TV[0]):
        with pytest.raises(ValueError, match="logits_TV: expected"):
            logprob_entropy(wrong, path.place(torch.tensor([0, 1])))


@pytest.mark.skipif(not NATIVE, reason="kernels._native is not built")
def test_vector_exp_is_within_two_ulp(path: Path):
    if path.capability is None:
        pytest.skip("not a CPU instruction set")
    x = -torch.cat((torch.linspace(0, 87.3, 999936), torch.rand(64, generator=torch.Generator().manual_seed(9)) * 1e-6))
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
