"""How the loss head spends memory and precision: chunks in one buffer, the gradient in the logits' place, sums in fp32."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace

import pytest
import torch
from head_problems import Problem, by_definition, by_head, close, largest_error, problem
from kernel_paths import REFERENCE, TRITON, Path, set_chunk_rows
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import head, matmul
from kernels.head import Head
from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import linear_policy_loss
from kernels.triton_rows import narrowed


def peak_bytes(path: Path, function) -> tuple[int, int]:
    """(the most bytes of tensors that lived at once, the largest one), of what the function makes."""
    if path.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = largest = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler records allocations"
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return peak, largest


@pytest.mark.parametrize(
    ("which", "dtype"),
    [("policy", torch.float32), ("policy", torch.bfloat16), ("logprob", torch.bfloat16), ("scores", torch.bfloat16)],
)
def test_whole_logits_never_exist(path: Path, which, dtype, monkeypatch):
    """A chunk's logits, d_weight in fp32 and what backward returns; neither [T, V] nor a second chunk of logits."""
    tokens, hidden, vocabulary, rows = 32, 2, 2000, 2
    set_chunk_rows(monkeypatch, path, rows, vocabulary)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", 100 * hidden)
    given_problem = problem(dtype=dtype, shape=(tokens, hidden, vocabulary), weight_0=False)
    hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
    leaves = hidden_TD.requires_grad_(which != "scores"), weight_VD.requires_grad_(which != "scores")

    def run() -> None:
        if which == "policy":
            linear_policy_loss(*leaves, inputs).loss.backward()
            return
        outputs = linear_logprob_entropy(*leaves, inputs.labels_T)
        if which == "logprob":
            torch.stack(outputs).sum().backward()

    if path.device == "cuda":
        run()  # the first GEMM takes memory of its own
    peak, largest = peak_bytes(path, run)
    chunk = rows * 2048 * 4
    gradients = 0 if which == "scores" else weight_VD.numel() * (4 + weight_VD.itemsize) + hidden_TD.nbytes
    small = 64 * tokens + 10 * 512
    # PyTorch's own definition holds several copies of a chunk, and the GEMMs of a CPU a widened tile and its product.
    copies = 11 if path.backend == "reference" else 1 + 2 * (path.device == "cpu")
    assert copies * chunk + gradients + small < tokens * vocabulary * 4
    assert peak <= copies * chunk + gradients + small
    assert largest <= max(chunk, weight_VD.numel() * 4)


@pytest.mark.parametrize("hidden", [8, 30, 200], ids=["small", "odd", "wider than half the columns"])
@pytest.mark.parametrize("vocabulary", [83, 64, 200, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_in_place_is_that_of_separate_operations(dtype, vocabulary, hidden, monkeypatch):
    """Triton's pass over a chunk, narrowing where the weight is narrow, against plain PyTorch's three steps in fp32."""
    set_chunk_rows(monkeypatch, TRITON, 2, vocabulary)
    set_chunk_rows(monkeypatch, REFERENCE, 2, vocabulary)
    fields = {"entropy_weight": 0.05, "kl_coefficient": 0.3, "temperature": 0.8}
    given_problem = problem(dtype=dtype, shape=(5, hidden, vocabulary), size=0.3, **fields)
    with TRITON.chosen():
        ours = by_head(given_problem, TRITON)
    with REFERENCE.chosen():
        separate = by_head(given_problem, REFERENCE)
    exact_parts, *exact_gradients = by_definition(given_problem.double())
    assert close(ours[0].loss, separate[0].loss, 1e-5)
    for got, plain, exact in zip(ours[1:], separate[1:], exact_gradients, strict=True):
        # Narrow d_logits are rounded once more than there. In fp32 it is the GEMMs that round.
        allowed = (40 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * (exact.abs().max().item() + 0.1)
        assert largest_error(got, plain.double()) <= allowed
        assert largest_error(got, exact) <= allowed
    assert close(ours[0].loss.double(), exact_parts[0].detach(), 1e-5)


def test_narrowed_is_the_upper_half_of_each_row():
    logits_TV = torch.zeros(3, 128)
    for dtype in (torch.bfloat16, torch.float16):
        half_TV = narrowed(logits_TV, 83, dtype)
        assert (half_TV.shape, half_TV.stride(), half_TV.dtype) == ((3, 83), (256, 1), dtype)
        assert half_TV.data_ptr() - logits_TV.data_ptr() == 128 * 2
    whole_TV = narrowed(logits_TV, 83, torch.float32)
    assert (whole_TV.data_ptr(), whole_TV.shape) == (logits_TV.data_ptr(), (3, 83))


@functools.cache
def of_many_chunks(rows: int) -> tuple[Problem, Tensor, Tensor]:
    """(problem, exact d_weight, `bf16_chunk_sum`)."""
    given_problem = problem(dtype=torch.bfloat16, shape=(48, 16, 50), weight_0=False)
    return given_problem, by_definition(given_problem.double())[2], bf16_chunk_sum(given_problem, rows)


def bf16_chunk_sum(given_problem: Problem, rows: int) -> Tensor:
    """d_weight as a chunked head gets it whose chunks' products leave the GEMM in bf16 and are added up in bf16."""
    tokens = len(given_problem.hidden_TD)
    total_VD = torch.zeros_like(given_problem.weight_VD)
    for start in range(0, tokens, rows):
        chunk = given_problem.tokens(slice(start, start + rows))
        total_VD += by_definition(chunk)[2]
    return total_VD


def test_d_weight_is_summed_in_fp32(path: Path, monkeypatch):
    """24 chunks: three times nearer to the truth than sums in bf16, and a hundred times where an fp32 gradient is asked for."""
    rows, vocabulary = 2, 50
    set_chunk_rows(monkeypatch, path, rows, vocabulary)
    if path.backend == "triton":
        set_chunk_rows(monkeypatch, path, rows, 64)
    given_problem, exact, in_bf16 = of_many_chunks(rows)

    def rms(got: Tensor) -> float:
        return (got.double() - exact).square().mean().sqrt().item()

    naive = rms(in_bf16)
    assert rms(by_head(given_problem, path)[2]) * 3 < naive
    hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
    weight_VD.requires_grad_().grad_dtype = torch.float32
    linear_policy_loss(hidden_TD, weight_VD, inputs).loss.backward()
    assert weight_VD.grad.dtype == torch.float32
    # Triton's d_logits are bf16, and their roundings stay; nothing else is rounded.
    assert rms(weight_VD.grad.cpu()) * (6 if path.backend == "triton" else 100) < naive


@pytest.mark.parametrize("which", ["policy", "logprob"])
def test_an_fp32_gradient_of_a_bf16_weight_is_the_bf16_one_before_its_rounding(path: Path, which):
    given_problem = problem(dtype=torch.bfloat16, entropy_weight=0.05)
    gradients = []
    for wanted in (None, torch.float32):
        hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
        weight_VD.requires_grad_()
        if wanted is not None:
            weight_VD.grad_dtype = wanted
        if which == "policy":
            linear_policy_loss(hidden_TD, weight_VD, inputs).loss.backward()
        else:
            linear_logprob_entropy(hidden_TD, weight_VD, inputs.labels_T)[0].sum().backward()
        gradients.append(weight_VD.grad)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    assert torch.equal(gradients[1].bfloat16(), gradients[0])


@pytest.mark.parametrize("which", ["policy", "logprob"])
def test_a_weight_that_takes_any_gradient_gets_the_sum(path: Path, which):
    """grad_dtype None, as for weights in bf16 whose gradients are kept in fp32."""
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=torch.bfloat16)))
    weight_VD.requires_grad_().grad_dtype = None
    if which == "policy":
        linear_policy_loss(hidden_TD, weight_VD, inputs).loss.backward()
    else:
        linear_logprob_entropy(hidden_TD, weight_VD, inputs.labels_T)[0].sum().backward()
    assert weight_VD.grad.dtype == torch.float32
    assert not torch.equal(weight_VD.grad.bfloat16().float(), weight_VD.grad), "it was not rounded on its way"


@pytest.mark.parametrize("which", ["policy", "logprob"])
def test_the_logits_are_gone_when_the_sum_is_rounded(path: Path, which, monkeypatch):
    """Nobody's loop variable holds the buffer; three times as much as d_weight in bf16 for a vocabulary of 152K."""
    gone = []

    def d_weight(self: Head) -> Tensor:
        buffer = StorageWeakRef(self.buffer.untyped_storage())
        result = rounded(self)
        gc.collect()  # of Triton's interpreter's last launch
        gone.append(buffer.expired())
        return result

    rounded = Head.d_weight
    monkeypatch.setattr(Head, "d_weight", d_weight)
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=torch.bfloat16)))
    leaves = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    if which == "policy":
        linear_policy_loss(*leaves, inputs).loss.backward()
    else:
        linear_logprob_entropy(*leaves, inputs.labels_T)[0].sum().backward()
    assert gone == [True]


def test_fp16_does_not_lose_a_small_share_of_a_mean(path: Path):
    """A token of 16,384: its d_logits are mostly below fp16's smallest number, and the scale of the loss comes after them."""
    given_problem = problem(dtype=torch.float16, shape=(8, 16, 2000), weight_0=False)
    inputs = replace(given_problem.inputs, weight_T=torch.full((8,), 1 / 16384))
    given_problem = given_problem._replace(inputs=inputs)
    hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
    hidden_TD.requires_grad_()
    (65536 * linear_policy_loss(hidden_TD, weight_VD, inputs).loss).backward()
    exact = 65536 * by_definition(given_problem.double())[1]
    assert (hidden_TD.grad.cpu().double() - exact).norm() <= 2e-3 * exact.norm()


class Returned(TorchDispatchMode):
    """The addresses of what keju::linear_policy_loss returned; not the tensors, which a reference would have autograd copy."""

    addresses: tuple[int, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.keju.linear_policy_loss.default:
            self.addresses = tuple(tensor.data_ptr() for tensor in result)
        return result


@pytest.mark.parametrize("wanted", [None, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_gradient_is_handed_out_without_a_copy(path: Path, factor, wanted):
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=torch.bfloat16)))
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_().grad_dtype = wanted or torch.bfloat16
    with Returned() as returned:
        (factor * linear_policy_loss(hidden_TD, weight_VD, inputs).loss).backward()
    assert (hidden_TD.grad.data_ptr(), weight_VD.grad.data_ptr()) == returned.addresses[4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1, -1.0, 0.0])
def test_what_arrives_scales_both_gradients(path: Path, factor, dtype):
    """By 1 no bit changes; else each number is multiplied in fp32 and rounded once."""
    given_problem = problem(dtype=dtype, entropy_weight=0.05)
    _, *plain = by_head(given_problem, path)
    hidden_TD, weight_VD, inputs = path.place(tuple(given_problem))
    leaves = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    (linear_policy_loss(*leaves, inputs).loss * factor).backward()
    for leaf, want in zip(leaves, plain, strict=True):
        scaled = (want.float() * torch.tensor(factor)).to(dtype)
        # Without Triton a factor on a GPU is rounded to bf16 first: reading it would wait for the device.
        rounding = torch.finfo(dtype).eps if path.backend == "cuda" else 0
        torch.testing.assert_close(leaf.grad.cpu(), scaled, rtol=rounding, atol=0)


def test_gradients_of_several_losses_add_up(path: Path):
    """Micro-batches: the second backward's gradient is added to the first's."""
    problems = [problem(dtype=torch.float32, seed=seed) for seed in (1, 2)]
    wanted = sum(by_head(given_problem._replace(weight_VD=problems[0].weight_VD), path)[2] for given_problem in problems)
    weight_VD = path.place(problems[0].weight_VD).requires_grad_()
    for given_problem in problems:
        linear_policy_loss(path.place(given_problem.hidden_TD), weight_VD, path.place(given_problem.inputs)).loss.backward()
    assert torch.equal(weight_VD.grad.cpu(), wanted)


@pytest.mark.parametrize("retain_graph", [True, False])
def test_a_second_backward_is_an_error_that_says_so(path: Path, retain_graph):
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=torch.float32)))
    loss = linear_policy_loss(hidden_TD.requires_grad_(), weight_VD, inputs).loss
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="linear_policy_loss: its gradients were given out"):
        loss.backward()


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "limit", "rows"),
    [
        (0, 100, 1000, 1),
        (1, 100, 1000, 1),
        (10, 100, 1000, 10),
        (11, 100, 1000, 6),
        (25, 100, 1000, 9),
        (5, 100, 99, 1),
        (16384, 4 * 152064, 2_500_000_000, 4096),
        (129, 1, 128, 128),
        (1000, 1, 600, 512),
    ],
)
def test_chunks_are_few_and_equal(tokens, row_bytes, limit, rows, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", limit)
    assert head.chunk_rows(tokens, row_bytes, "cpu") == rows
    assert rows * row_bytes <= max(limit, row_bytes)


def test_gemms_widen_before_they_multiply(monkeypatch):
    """Rounded to bf16 a product would be off by 1e-2, and so would a sum of chunks. The weight is widened in three tiles."""
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", 3 * 64)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, d_logits = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 64), (7, 64), (5, 7)))
    exact = [x.double() for x in (hidden, weight, d_logits)]
    for dtype in (torch.float32, torch.float64):
        logits, d_hidden, d_weight = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((5, 7), (5, 64), (7, 64)))
        matmul.logits_into(logits, hidden, weight)
        matmul.d_hidden_into(d_hidden, d_logits, weight)
        matmul.add_d_weight(d_weight, d_logits, hidden, first=True)
        matmul.add_d_weight(d_weight, d_logits.to(dtype), hidden, first=False)
        assert largest_error(logits, exact[0] @ exact[1].T) < 1e-5
        assert largest_error(d_hidden, exact[2] @ exact[1]) < 1e-5
        assert largest_error(d_weight, 2 * exact[2].T @ exact[0]) < 1e-5
