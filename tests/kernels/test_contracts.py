"""What the row operations promise besides their numbers: the same bits each time, no byte written elsewhere, any size."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import Path
from logits_problems import gradient, with_layout
from torch import Tensor

from kernels import reference
from kernels.logprob_entropy import logprob_entropy, logprob_entropy_backward_, logprob_entropy_forward

DTYPES = [torch.float32, torch.bfloat16]


def problem(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits_TV, labels_T, d_2T); the second label is IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(rows, vocabulary, generator=generator) * 5).to(dtype)
    labels_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels_T[1:2] = reference.IGNORE
    return logits_TV, labels_T, torch.randn(2, rows, generator=generator)


def everything(path: Path, logits_TV: Tensor, labels_T: Tensor, d_2T: Tensor, temperature: float | Tensor = 0.8) -> list[Tensor]:
    """logprob_T, entropy_T and d_logits_TV, on the CPU."""
    placed = path.place((logits_TV, labels_T, temperature))
    values = [value_T.cpu() for value_T in logprob_entropy(*placed)]
    return [*values, gradient(logprob_entropy, *placed, *path.place(tuple(d_2T)))]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_two_runs_give_the_same_bits(path: Path, dtype: torch.dtype):
    inputs = problem(5, 9001, dtype)
    first, second = everything(path, *inputs), everything(path, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(path: Path, dtype: torch.dtype):
    if path.backend != "native":
        pytest.skip("torch divides some reductions by thread; Triton and CUDA have none")
    inputs, threads, outcomes = problem(37, 9001, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(everything(path, *inputs))
    finally:
        torch.set_num_threads(threads)
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 2100, 8200])
def test_a_row_does_not_depend_on_its_batch(path: Path, dtype: torch.dtype, vocabulary: int):
    """Alone, between others, and in rows of another stride and alignment: the same bits."""
    if path.backend == "reference":
        pytest.skip("torch chooses the order of its sums by shape and stride")
    logits_TV, labels_T, d_2T = problem(4, vocabulary, dtype)
    temperature_T = torch.tensor([0.8, 1.0, 0.3, 2.0])
    whole = everything(path, logits_TV, labels_T, d_2T, temperature_T)
    for row in (0, 3):
        one = slice(row, row + 1)
        for layout in ("plain", "rows"):
            alone_TV = with_layout(logits_TV[one], layout)
            alone = everything(path, alone_TV, labels_T[one], d_2T[:, one], temperature_T[one])
            assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "rows"])
def test_inplace_backward_overwrites_the_logits_with_the_same_gradient(path: Path, dtype: torch.dtype, layout: str):
    logits_TV, labels_T, d_2T = problem(4, 1500, dtype)
    labels_T = labels_T.clamp_max(1499)
    want_TV = everything(path, logits_TV, labels_T, d_2T, 0.9)[2]

    leaf_TV, labels_T = path.place((with_layout(logits_TV, "plain"), labels_T))
    leaf_TV.requires_grad_()
    middle_TV = with_layout(leaf_TV * 1, layout)
    outputs = logprob_entropy(middle_TV, labels_T, 0.9, inplace_backward=True)
    arrived = tuple(d_2T.to(outputs[0]))
    torch.autograd.backward(outputs, arrived, retain_graph=True)
    assert torch.equal(leaf_TV.grad.cpu(), want_TV)
    assert torch.equal(middle_TV.detach().cpu(), want_TV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, arrived)

    logits_TV = path.place(with_layout(logits_TV, layout))
    logprob_T, _, saved_3T = logprob_entropy_forward(logits_TV, labels_T, 0.9)
    assert logprob_entropy_backward_(logits_TV, labels_T, 0.9, logprob_T, saved_3T, *arrived) is logits_TV
    assert torch.equal(logits_TV.cpu(), want_TV)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 2048, 2051, 4101])
def test_the_inplace_backward_writes_nothing_outside(path: Path, dtype: torch.dtype, vocabulary: int):
    """Guard columns on both sides of every row, guard rows above and below: their bytes stay."""
    logits_TV, labels_T, d_2T = problem(3, vocabulary, dtype)
    frame = torch.arange(5 * (vocabulary + 20), dtype=torch.int32).reshape(5, -1).to(dtype)
    frame[1:4, 9 : 9 + vocabulary] = logits_TV
    frame = path.place(frame)
    before, inside_TV = frame.clone(), frame[1:4, 9 : 9 + vocabulary]
    labels_T, d_2T = path.place((labels_T, d_2T))
    logprob_T, _, saved_3T = logprob_entropy_forward(inside_TV, labels_T)
    assert torch.equal(frame, before), "the forward writes none of its input"
    logprob_entropy_backward_(inside_TV, labels_T, 1.0, logprob_T, saved_3T, *d_2T)
    outside = torch.ones_like(frame, dtype=torch.bool)
    outside[1:4, 9 : 9 + vocabulary] = False
    assert torch.equal(frame[outside], before[outside])
    assert vocabulary == 1 or not torch.equal(inside_TV, before[1:4, 9 : 9 + vocabulary])


def test_inplace_backward_refuses_what_it_cannot_overwrite(path: Path):
    labels_T = path.place(torch.tensor([0, 1]))
    for logits_TV in (torch.zeros(5, 2).t(), torch.zeros(1, 5).expand(2, 5)):
        with pytest.raises(ValueError, match="logits_TV: to be overwritten"):
            logprob_entropy(path.place(logits_TV), labels_T, inplace_backward=True)


def test_offsets_beyond_32_bits(path: Path):
    """Two bf16 rows 2^31 + 8 elements apart. On a CPU only the pages that hold them are ever touched."""
    if path.backend == "reference":
        pytest.skip("plain PyTorch would copy what lies between")
    try:
        memory = torch.empty(2**31 + 8 + 1000, dtype=torch.bfloat16, device=path.device)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    inputs_TV, labels_T, d_2T = problem(2, 1000, torch.bfloat16)
    labels_T = torch.tensor([3, 999])
    want = everything(path, inputs_TV, labels_T, d_2T, 1.0)
    logits_TV = memory.as_strided((2, 1000), (2**31 + 8, 1))
    logits_TV.copy_(inputs_TV)
    labels_T, d_2T = path.place((labels_T, d_2T))
    logprob_T, entropy_T, saved_3T = logprob_entropy_forward(logits_TV, labels_T)
    assert torch.equal(logprob_T.cpu(), want[0])
    assert torch.equal(entropy_T.cpu(), want[1])
    logprob_entropy_backward_(logits_TV, labels_T, 1.0, logprob_T, saved_3T, *d_2T)
    assert torch.equal(logits_TV.cpu(), want[2])


def test_more_rows_than_a_grid_dimension_may_have(path: Path):
    """65,535 is the limit of a CUDA grid's second and third dimension."""
    if path.backend == "triton" and path.device == "cpu":
        pytest.skip("an hour in the interpreter: on a GPU only")
    rows = 70_001
    inputs = problem(rows, 5)
    inputs[1][1] = 0
    exact = reference.logprob_entropy(inputs[0].double(), inputs[1], 0.8)
    got = everything(path, *inputs)
    for value_T, want in zip(got, exact, strict=False):
        torch.testing.assert_close(value_T.double(), want, rtol=1e-5, atol=1e-6)
    last = everything(path, *(x[-1:] for x in inputs[:2]), inputs[2][:, -1:])
    assert path.backend == "reference" or all(torch.equal(a, b[-1:]) for a, b in zip(last, got, strict=True))
