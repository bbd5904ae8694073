"""The CUDA kernels of csrc/cuda, run on a CPU.

The same .cu file is compiled for a CPU (cuda_on_cpu.h: threads as fibers, an exponential as inexact as the hardware's may be) and
compared with fp64. It proves the mathematics, the indexing, the order of loads and stores and the barriers; it says nothing of
speed or of a driver. Alignment is checked as on the device: a misaligned 16-byte access ends the process. It is built twice, as
written and with products and sums contracted to FMA as nvcc may, since both must hold.

The criterion. A value may be off by 3e-6 and a few fp32 roundings of itself: c = log2(e)/temperature is rounded to fp32, which
moves the entropy by up to 6e-8 times the variance of log p, and each exponential may be off by 2e-7. A gradient may be off by as
much of the largest term that goes into it, plus 2e-7 of it for every nat between p and 1 (the rounding of an exponent), and one
rounding to the logits' dtype.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import GXX, TYPES, arguments_of, backward, build, forward, has_fma
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference

INF, NAN = float("inf"), float("nan")
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of a rounding to the dtype; fp32's is in the tolerance already."""
NOTHING = {torch.float32: 1e-33, torch.bfloat16: 1e-33, torch.float16: 2.0**-24}
"""Exponentials below 2^-126 are 0, and fp16's smallest step is 2^-24."""
BLOCK_BYTES = 512 * 4 * 16
"""What a block reads in one step of its loop."""

pytestmark = pytest.mark.skipif(GXX is None, reason="the sources' CPU build needs g++")


@pytest.fixture(scope="module", params=["as written", "contracted"])
def library(request, tmp_path_factory) -> ctypes.CDLL:
    if request.param == "contracted" and not has_fma():
        pytest.skip("this processor has no FMA")
    flags = ["-ffp-contract=off"] if request.param == "as written" else ["-ffp-contract=fast", "-mfma"]
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("cuda"), flags)))


def placed(values_TV: Tensor, offset: int, gap: int) -> tuple[Tensor, Tensor]:
    """(buffer, view): the values `offset` elements behind a 16-byte boundary, `gap` elements between rows, NaN all around."""
    rows, vocabulary = values_TV.shape
    stride = vocabulary + gap
    buffer = torch.full((offset + rows * stride + 64,), NAN, dtype=values_TV.dtype)
    assert buffer.data_ptr() % 16 == 0
    view_TV = buffer.as_strided((rows, vocabulary), (stride, 1), offset)
    view_TV.copy_(values_TV)
    return buffer, view_TV


def exact_gradient(logits_TV, labels_T, temperature, d_logprob_T, d_entropy_T) -> tuple[Tensor, Tensor]:
    """(d_logits, the size of the terms that go into it) in fp64, by the formulas of kernels/reference.py."""
    temperature = temperature.double().unsqueeze(1)
    kept_T1 = (labels_T != reference.IGNORE).unsqueeze(1)
    label_TV = torch.nn.functional.one_hot(labels_T.clamp_min(0), logits_TV.shape[1]).bool()
    log_p_TV = (logits_TV.double() / temperature).log_softmax(1)
    p_TV = log_p_TV.exp()
    log_p_TV = log_p_TV.masked_fill(p_TV == 0, 0)
    entropy_T1 = -(p_TV * log_p_TV).sum(1, keepdim=True)
    others_T1 = p_TV.masked_fill(label_TV, 0).sum(1, keepdim=True)
    d_logprob_T1, d_entropy_T1 = d_logprob_T.double().unsqueeze(1), d_entropy_T.double().unsqueeze(1)
    from_logprob_TV = d_logprob_T1 * torch.where(label_TV, others_T1, -p_TV)
    from_entropy_TV = -d_entropy_T1 * p_TV * (log_p_TV + entropy_T1)
    # The formula's own cancellation: log p + H is the difference of a_j and the mean of a.
    size_TV = d_logprob_T1.abs() * torch.where(label_TV, others_T1, p_TV)
    size_TV = size_TV + d_entropy_T1.abs() * p_TV * (log_p_TV.abs() + entropy_T1 + math.log(logits_TV.shape[1]) + 1)
    size_TV = size_TV * (1 + log_p_TV.abs() / 15)
    exact_TV = (from_logprob_TV + from_entropy_TV) / temperature
    return torch.where(kept_T1, exact_TV, 0), torch.where(kept_T1, size_TV / temperature, 0)


def check_values(got: tuple[Tensor, Tensor, Tensor], logits_TV: Tensor, labels_T: Tensor, temperature: Tensor) -> None:
    exact = reference.logprob_entropy(logits_TV.double(), labels_T, temperature.double())
    for ours, want, name in zip(got[:2], exact, ("logprob", "entropy"), strict=True):
        difference = torch.where(ours.double() == want, 0, (ours.double() - want).abs())
        assert (difference <= 3e-6 + 1e-6 * want.abs()).all(), f"{name}: {ours} for {want}"
    assert (got[0] <= 0).all()
    assert (got[1] >= 0).all()
    kept_T = labels_T != reference.IGNORE
    z_TV = logits_TV.double() / temperature.double().unsqueeze(1)
    maximum_T = logits_TV.double().amax(1)
    a_TV = z_TV - (maximum_T / temperature.double()).unsqueeze(1)
    e_TV = a_TV.exp()
    mean_T = (e_TV * a_TV.masked_fill(e_TV == 0, 0)).sum(1) / e_TV.sum(1)
    for ours, want, ignored in zip(got[2], (maximum_T, e_TV.sum(1), mean_T), (0, 1, 0), strict=True):
        torch.testing.assert_close(ours.double(), torch.where(kept_T, want, ignored), rtol=3e-6, atol=3e-6)


def check_gradient(got_TV: Tensor, exact_TV: Tensor, size_TV: Tensor) -> None:
    rounding = UNIT[got_TV.dtype]
    allowed_TV = 3e-6 * size_TV + rounding * (exact_TV.abs() + 3e-6 * size_TV) + NOTHING[got_TV.dtype]
    off_TV = (got_TV.double() - exact_TV).abs()
    assert (off_TV <= allowed_TV).all(), f"off by {(off_TV / allowed_TV).max()} of what is allowed"


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    """(logits, labels, temperature [1] or [T], d_logprob, d_entropy, placement). A label and one other of a row are finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    dtype = draw(st.sampled_from(list(TYPES)))
    rows = draw(st.integers(1, 3))
    step = BLOCK_BYTES // dtype.itemsize
    vocabulary = draw(st.one_of(st.integers(1, 70), st.sampled_from([1023, 4096, step - 1, step, step + 13, 2 * step + 4099])))
    scale = draw(st.sampled_from([1e-4, 1.0, 4.0, 30.0, 1e3, 1e6]))
    shift = draw(st.sampled_from([0.0, 50.0, -3e3]))
    if dtype == torch.float16:
        scale, shift = min(scale, 1e4), shift
    logits_TV = (torch.randn(rows, vocabulary, generator=generator) * scale + shift).clamp(-6e4, 6e4)
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
    per_row_T = torch.rand(rows, generator=generator) * 2 + 0.05
    temperature = per_row_T if temperature == "per row" else torch.tensor([temperature])
    d_logprob_T, d_entropy_T = torch.randn(2, rows, generator=generator)
    placement = tuple(draw(st.integers(0, 17)) for _ in range(4))
    return logits_TV.to(dtype), labels_T, temperature, d_logprob_T, d_entropy_T, placement


@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_forward_and_backward_against_fp64(library, problem):
    values_TV, labels_T, temperature, d_logprob_T, d_entropy_T, (offset, gap, d_offset, d_gap) = problem
    _, logits_TV = placed(values_TV, offset, gap)
    got = forward(library, logits_TV, labels_T, temperature)
    check_values(got, logits_TV, labels_T, temperature)
    exact = exact_gradient(values_TV, labels_T, temperature, d_logprob_T, d_entropy_T)
    tail = (logits_TV, labels_T, temperature, got[0], got[2], d_logprob_T, d_entropy_T)

    # Apart from the logits, on a memory of its own alignment.
    d_buffer, d_logits_TV = placed(torch.full_like(values_TV, 12345.0), d_offset, d_gap)
    backward(library, *tail, d_logits_TV)
    check_gradient(d_logits_TV, *exact)
    assert logits_TV.equal(values_TV), "the logits were overwritten"
    elsewhere = d_buffer.clone()
    elsewhere.as_strided(d_logits_TV.shape, d_logits_TV.stride(), d_offset).fill_(NAN)
    assert elsewhere.isnan().all(), "something was written outside the gradient"

    # In place: the same numbers.
    buffer, logits_TV = placed(values_TV, d_offset, d_gap)
    backward(library, logits_TV, *tail[1:], logits_TV)
    assert logits_TV.equal(d_logits_TV)
    assert buffer.view(-1)[:d_offset].isnan().all()


def row(vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


ONE = torch.ones(1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("label", [0, 3, 8, 9000, 16390, 16392])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_the_label_anywhere_in_the_row(library, dtype, label, offset):
    """In the head, in a vector, at the end of a step, in the tail."""
    _, logits_TV = placed(row(16393).to(dtype), offset, 3)
    labels_T = torch.tensor([label])
    got = forward(library, logits_TV, labels_T, ONE)
    check_values(got, logits_TV, labels_T, ONE)
    d_TV = torch.empty_like(logits_TV)
    backward(library, logits_TV, labels_T, ONE, got[0], got[2], ONE, ONE, d_TV)
    check_gradient(d_TV, *exact_gradient(logits_TV, labels_T, ONE, ONE, ONE))


@pytest.mark.parametrize("vocabulary", [2, 1000, 5000])
@pytest.mark.parametrize("gap", [8.0, 20.0, 60.0, 80.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_near_certain_label_keeps_relative_accuracy(library, vocabulary, gap, temperature):
    # Such that the difference of the two largest is no fp32 number.
    logits_TV = row(vocabulary).clamp(-3, 0.1234567)
    logits_TV[0, 1] = gap + 0.2345678
    labels_T, temperature = torch.tensor([1]), torch.tensor([temperature])
    got = forward(library, logits_TV, labels_T, temperature)
    # By the grouping of entropy: here even fp64 has no digits left of a logarithm of p near 1.
    z_V = logits_TV[0].double() / temperature.double()
    others_V = torch.cat((z_V[:1], z_V[2:]))
    d = (z_V[1] - others_V.logsumexp(0)).item()
    logprob, p_others = -math.log1p(math.exp(-d)), math.exp(-d) / (1 + math.exp(-d))
    entropy_others = -(others_V.softmax(0) * others_V.log_softmax(0)).sum().item()
    entropy = -math.exp(logprob) * logprob + p_others * (entropy_others + d - logprob)
    assert got[0].item() == pytest.approx(logprob, rel=5e-7, abs=1e-37)
    assert got[1].item() == pytest.approx(entropy, rel=1e-6, abs=1e-37)
    d_TV = torch.empty_like(logits_TV)
    backward(library, logits_TV, labels_T, temperature, got[0], got[2], ONE, torch.zeros(1), d_TV)
    assert d_TV[0, 1].item() == pytest.approx(p_others / temperature.item(), rel=1e-6, abs=1e-37)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_label_of_minus_infinity(library, dtype):
    logits_TV = row(900).to(dtype)
    logits_TV[0, 5] = -INF
    got = forward(library, logits_TV, torch.tensor([5]), ONE)
    exact = reference.logprob_entropy(logits_TV.double(), torch.tensor([5]))
    assert got[0].item() == -INF
    assert got[1].item() == pytest.approx(exact[1].item(), rel=1e-6)
    d_TV = torch.empty_like(logits_TV)
    backward(library, logits_TV, torch.tensor([5]), ONE, got[0], got[2], ONE, ONE, d_TV)
    assert d_TV.isfinite().all()
    assert d_TV[0, 5] == 1  # 1 - p, with p = 0


@pytest.mark.parametrize("vocabulary", [1, 2, 9, 5000])
def test_one_finite_logit_is_certain(library, vocabulary):
    logits_TV = torch.full((1, vocabulary), -INF)
    logits_TV[0, vocabulary // 2] = 7.5
    labels_T = torch.tensor([vocabulary // 2])
    got = forward(library, logits_TV, labels_T, ONE)
    assert (got[0].item(), got[1].item(), got[2].flatten().tolist()) == (0.0, 0.0, [7.5, 1.0, 0.0])
    d_TV = torch.empty_like(logits_TV)
    backward(library, logits_TV, labels_T, ONE, got[0], got[2], ONE, ONE, d_TV)
    assert (d_TV == 0).all()


def test_a_lone_finite_logit_that_is_not_the_label(library):
    logits_TV = torch.full((1, 5000), -INF)
    logits_TV[0, 4321] = -2.0
    got = forward(library, logits_TV, torch.tensor([3]), ONE)
    assert (got[0].item(), got[1].item(), got[2].flatten().tolist()) == (-INF, 0.0, [-2.0, 1.0, 0.0])


@pytest.mark.parametrize("dtype", TYPES)
def test_the_lowest_finite_logits_mask_like_minus_infinity(library, dtype):
    logits_TV = torch.full((1, 3000), torch.finfo(dtype).min, dtype=dtype)
    logits_TV[0, 100:110] = torch.arange(10)
    labels_T, temperature = torch.tensor([105]), torch.tensor([0.7])
    got = forward(library, logits_TV, labels_T, temperature)
    check_values(got, logits_TV, labels_T, temperature)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("at", [0, 5, 4000, 8200, 8202])
@pytest.mark.parametrize("is_label", [False, True])
def test_nan_is_not_hidden(library, dtype, at, is_label):
    logits_TV = row(8203).to(dtype)
    logits_TV[0, at] = NAN
    labels_T = torch.tensor([at if is_label else 17])
    got = forward(library, logits_TV, labels_T, ONE)
    assert got[0].isnan().all()
    assert got[1].isnan().all()
    d_TV = torch.zeros_like(logits_TV)
    backward(library, logits_TV, labels_T, ONE, got[0], got[2], ONE, ONE, d_TV)
    assert d_TV.isnan().all()


@pytest.mark.parametrize("vocabulary", [1, 7, 5000])
@pytest.mark.parametrize("filling", [-INF, NAN])
def test_a_row_without_a_distribution_is_nan(library, vocabulary, filling):
    logits_TV, labels_T = torch.full((1, vocabulary), filling), torch.zeros(1, dtype=torch.int64)
    got = forward(library, logits_TV, labels_T, ONE)
    assert got[0].isnan().all()
    assert got[1].isnan().all()
    d_TV = torch.zeros_like(logits_TV)
    backward(library, logits_TV, labels_T, ONE, got[0], got[2], ONE, ONE, d_TV)
    assert d_TV.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_that_is_none_gives_nan(library, temperature):
    logits_TV, labels_T, temperature = row(300), torch.tensor([4]), torch.tensor([temperature])
    got = forward(library, logits_TV, labels_T, temperature)
    assert got[0].isnan().all()
    assert got[1].isnan().all()
    backward(library, logits_TV, labels_T, temperature, got[0], got[2], ONE, ONE, logits_TV)
    assert logits_TV.isnan().all()


def test_ignored_rows_are_zero_whatever_they_hold(library):
    logits_TV = torch.full((2, 999), NAN)
    labels_T = torch.full((2,), reference.IGNORE)
    got = forward(library, logits_TV, labels_T, torch.tensor([NAN]))
    assert got[0].tolist() == got[1].tolist() == [0, 0]
    assert got[2].tolist() == [[0, 0], [1, 1], [0, 0]]
    backward(library, logits_TV, labels_T, ONE, *got[::2], torch.full((2,), NAN), torch.full((2,), NAN), logits_TV)
    assert (logits_TV == 0).all()


def test_a_row_gives_the_same_bits_wherever_it_stands(library):
    logits_TV = row(5000).expand(6, -1).contiguous()
    logits_TV[1::2] = row(5000, seed=1)
    got = forward(library, logits_TV, torch.full((6,), 123), ONE)
    for tensor in (got[0], got[1], *got[2]):
        assert tensor[::2].unique().numel() == tensor[1::2].unique().numel() == 1


def test_no_rows_and_too_many_columns(library):
    assert forward(library, torch.empty(0, 5), torch.empty(0, dtype=torch.int64), ONE)[2].shape == (3, 0)
    wide_TV = row(1).expand(1, 2**31)
    arguments = arguments_of(wide_TV, torch.zeros(1, dtype=torch.int64), ONE)
    assert library.forward(*arguments, None, None, None) != 0


def test_rows_beyond_2_to_the_31_elements(library):
    """The second row starts 2^31 + 8 elements behind the first. The memory between is never touched, so it is never there."""
    rows, vocabulary, stride = 2, 100, 2**31 + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 2 * (stride + vocabulary), flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for it: {error}")
    logits_TV = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, vocabulary), (stride, 1))
    values_TV = torch.cat((row(vocabulary), row(vocabulary, seed=1))).bfloat16()
    logits_TV.copy_(values_TV)
    labels_T, ones_T = torch.tensor([3, 4]), torch.ones(2)
    got = forward(library, logits_TV, labels_T, ONE)
    check_values(got, values_TV, labels_T, ONE)
    backward(library, logits_TV, labels_T, ONE, got[0], got[2], ones_T, ones_T, logits_TV)
    check_gradient(logits_TV.contiguous(), *exact_gradient(values_TV, labels_T, ONE, ones_T, ones_T))


@pytest.mark.parametrize("label", [5, -1, 2**40])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_label_outside_the_vocabulary_fails_an_assertion(library, label, direction):
    program = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]);"
        "logits, label, temperature = (ctypes.c_float * 5)(), (ctypes.c_int64 * 1)(int(sys.argv[2])), (ctypes.c_float * 1)(1);"
        "rest = [(ctypes.c_float * 5)() for _ in range(6)];"
        "numbers = [ctypes.c_int64(number) for number in (1, 5, 5)];"
        "given = [0, logits, *numbers, label, temperature, ctypes.c_int64(0)];"
        "forward = sys.argv[3] == 'forward';"
        "library.forward(*given, *rest[:3]) if forward else library.backward(*given, *rest[:5], ctypes.c_int64(5))"
    )
    command = [sys.executable, "-c", program, library._name, str(label), direction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "labels_T: a label lies outside [0, V) and is not -100" in done.stderr
