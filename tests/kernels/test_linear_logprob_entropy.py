"""linear_logprob_entropy: the definition in fp64, and in low precision the naive path's measure (test_linear_policy_loss.py)."""

from __future__ import annotations

import gc

import pytest
import torch
from head_problems import TOKENS, VOCABULARY, close, largest_error, problem
from kernel_paths import REFERENCE, Path, set_chunk_rows
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import head, reference
from kernels.linear_logprob_entropy import linear_logprob_entropy


def labelled(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden_TD, weight_VD, labels_T, incoming_2T)."""
    hidden_TD, weight_VD, inputs = problem(dtype=dtype, shape=(tokens, 24, VOCABULARY))
    labels_T = inputs.labels_T.clone()
    labels_T[[2, tokens - 1]] = reference.IGNORE
    return hidden_TD, weight_VD, labels_T, torch.randn(2, tokens, generator=torch.Generator().manual_seed(9))


def solved(function, hidden_TD: Tensor, weight_VD: Tensor, incoming_2T: Tensor) -> list[Tensor]:
    """[logprob_T, entropy_T, d_hidden_TD, d_weight_VD] on the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    outputs = function(*leaves)
    torch.autograd.backward(outputs, tuple(incoming_2T.to(outputs[0])))
    return [tensor.detach().cpu() for tensor in (*outputs, *(leaf.grad for leaf in leaves))]


def definition(labels_T: Tensor, temperature: float | Tensor):
    return lambda hidden_TD, weight_VD: reference.logprob_entropy(hidden_TD @ weight_VD.T, labels_T, temperature)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64)])
@pytest.mark.parametrize("chunk_rows", [100, 1, 4])
def test_fp64_is_the_definition(temperature, chunk_rows, monkeypatch):
    set_chunk_rows(monkeypatch, REFERENCE, chunk_rows, VOCABULARY, 8)
    hidden_TD, weight_VD, labels_T, incoming_2T = labelled(torch.float64)
    ours = solved(lambda h, w: linear_logprob_entropy(h, w, labels_T, temperature), hidden_TD, weight_VD, incoming_2T)
    exact = solved(definition(labels_T, temperature), hidden_TD, weight_VD, incoming_2T)
    assert all(close(got, expected) for got, expected in zip(ours, exact, strict=True))


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 1.5, TOKENS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_the_naive_path(path: Path, dtype, temperature, monkeypatch):
    set_chunk_rows(monkeypatch, path, 4, VOCABULARY)
    hidden_TD, weight_VD, labels_T, incoming_2T = labelled(dtype)
    exact = solved(definition(labels_T, temperature), hidden_TD.double(), weight_VD.double(), incoming_2T)
    naive = solved(definition(labels_T, temperature), hidden_TD, weight_VD, incoming_2T)
    placed_labels_T, placed_temperature = path.place((labels_T, temperature))
    ours = solved(
        lambda h, w: linear_logprob_entropy(h, w, placed_labels_T, placed_temperature),
        *path.place((hidden_TD, weight_VD, incoming_2T)),
    )
    ratio = 2.0 if dtype == torch.float32 else 1.0
    for what, got, plain, want in zip(("logprob", "entropy", "d_hidden", "d_weight"), ours, naive, exact, strict=True):
        result = torch.float32 if what in ("logprob", "entropy") else dtype
        assert got.dtype == result
        rounding = torch.finfo(result).eps * want.abs().max().item()
        assert largest_error(got, want) <= ratio * largest_error(plain, want) + rounding, what
        if what != "d_weight":
            assert (got[labels_T == reference.IGNORE] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_row(path: Path, dtype, monkeypatch):
    """A row's log-probability and d_hidden come from that row alone, whatever chunk it is in; two runs give the same bits."""
    hidden_TD, weight_VD, labels_T, incoming_2T = labelled(dtype)
    runs = []
    for chunk_rows in (100, 4, 4):
        set_chunk_rows(monkeypatch, path, chunk_rows, VOCABULARY)
        placed_labels_T = path.place(labels_T)
        runs.append(
            solved(
                lambda h, w, labels_T=placed_labels_T: linear_logprob_entropy(h, w, labels_T, 0.8),
                *path.place((hidden_TD, weight_VD, incoming_2T)),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    # A GEMM may divide its sums otherwise for another number of rows.
    for what, whole, chunked in zip(("logprob", "entropy", "d_hidden", "d_weight"), runs[0], runs[1], strict=True):
        eps = torch.finfo(whole.dtype).eps
        assert close(chunked, whole, 8 * eps), what


@pytest.fixture
def formed(monkeypatch) -> list[int]:
    """Rows whose logits were formed, a GEMM an entry."""
    rows: list[int] = []
    plain = head.logits_into
    note = lambda out_RV, hidden_RD, weight_VD: (rows.append(len(hidden_RD)), plain(out_RV, hidden_RD, weight_VD))  # noqa: E731
    monkeypatch.setattr(head, "logits_into", note)
    return rows


@pytest.mark.parametrize(("chunk_rows", "expected"), [(100, [10]), (4, [4, 4, 2, 4, 4])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_chunks_logits_stay_for_the_backward(path: Path, dtype, chunk_rows, expected, monkeypatch, formed):
    """And a second backward, which finds them overwritten, forms them again and gives the same."""
    set_chunk_rows(monkeypatch, path, chunk_rows, VOCABULARY, torch.promote_types(dtype, torch.float32).itemsize)
    hidden_TD, weight_VD, labels_T, incoming_2T = path.place(labelled(dtype))
    assert len(labels_T) == 10
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    outputs = linear_logprob_entropy(*leaves, labels_T, 0.8)
    incoming = tuple(incoming_2T.to(outputs[0]))
    first = torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)
    assert formed == expected
    formed.clear()
    second = torch.autograd.grad(outputs, leaves, incoming)
    assert formed == expected[: -(-10 // chunk_rows)], "every chunk once"
    eps = torch.finfo(dtype).eps
    assert torch.equal(first[0], second[0])
    assert close(first[1].cpu(), second[1].cpu(), 8 * eps), "of another order of chunks"
    if chunk_rows == 100:
        assert torch.equal(first[1], second[1])


def test_nothing_is_kept_where_nobody_asks_for_a_gradient_and_longer_than_the_outputs(path: Path, monkeypatch):
    hidden_TD, weight_VD, labels_T, _ = path.place(labelled(torch.float32))
    buffers = []
    plain = head.Head.__init__

    def note(self, *arguments):
        plain(self, *arguments)
        buffers.append(StorageWeakRef(self.buffer.untyped_storage()))

    monkeypatch.setattr(head.Head, "__init__", note)
    weight_VD.requires_grad_()
    with torch.no_grad():
        outputs = linear_logprob_entropy(hidden_TD, weight_VD, labels_T)
    gc.collect()  # of Triton's interpreter's last launch
    assert buffers.pop().expired()
    outputs = linear_logprob_entropy(hidden_TD, weight_VD, labels_T)
    gc.collect()
    assert not buffers[0].expired()
    gc.disable()
    try:
        del outputs
        assert buffers[0].expired(), "no cycle holds it"
    finally:
        gc.enable()


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_is_differentiable(path: Path, which):
    hidden_TD, weight_VD, labels_T, incoming_2T = labelled(torch.float32)
    ours, exact = [], []
    for found, function, cast in (
        (ours, lambda h, w: linear_logprob_entropy(h, w, path.place(labels_T)), path.place),
        (exact, definition(labels_T, 1.0), Tensor.double),
    ):
        leaves = [cast(tensor).clone().requires_grad_() for tensor in (hidden_TD, weight_VD)]
        output_T = function(*leaves)[which]
        (output_T * incoming_2T[0].to(output_T)).sum().backward()
        found += [leaf.grad.cpu() for leaf in leaves]
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_one_input_alone_may_need_a_gradient(path: Path, needs):
    hidden_TD, weight_VD, labels_T, _ = path.place(labelled(torch.float32))
    both = [tensor.clone().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    linear_logprob_entropy(*both, labels_T)[0].sum().backward()
    one = [hidden_TD.clone().requires_grad_(needs == "hidden"), weight_VD.clone().requires_grad_(needs == "weight")]
    linear_logprob_entropy(*one, labels_T)[0].sum().backward()
    at = 0 if needs == "hidden" else 1
    assert torch.equal(one[at].grad, both[at].grad)
    assert one[1 - at].grad is None


def test_no_tokens(path: Path):
    hidden_TD, weight_VD, labels_T, _ = path.place(labelled(torch.float32))
    leaves = [hidden_TD[:0].clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    logprob_T, entropy_T = linear_logprob_entropy(*leaves, labels_T[:0])
    assert logprob_T.shape == entropy_T.shape == (0,)
    (logprob_T.sum() + entropy_T.sum()).backward()
    assert leaves[0].grad.shape == (0, 24)
    assert (leaves[1].grad == 0).all()


@pytest.mark.parametrize("shapes", [((3, 4), (5, 3)), ((3,), (5, 3)), ((3, 4), (4,))])
def test_shapes_that_do_not_fit_are_an_error(path: Path, shapes):
    hidden, weight = (path.place(torch.zeros(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=r"hidden_TD, weight_VD: expected \[T, D\] and \[V, D\]"):
        linear_logprob_entropy(hidden, weight, path.place(torch.zeros(3, dtype=torch.long)))
