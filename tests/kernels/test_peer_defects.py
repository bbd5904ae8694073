"""Defects found in public kernels of the same purpose, one test each that this one is free of.

Each is a mistake that a kernel's ordinary tests, on random logits of a round vocabulary, do not show.
"""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import by_definition, by_head, problem
from kernel_paths import Path, set_chunk_rows
from logits_problems import INF, gradient
from torch import Tensor

from kernels import reference
from kernels.logprob_entropy import logprob_entropy

TILES = [2048, 4096]
"""Logits that Triton and CUDA C++ have at work at a time, fp32 and bf16; the CPU's vectors are shorter."""


def solved(path: Path, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_T, entropy_T and the gradient of both sums, on the CPU."""
    logprob_T, entropy_T = logprob_entropy(*path.place((logits_TV, labels_T)))
    ones_T = torch.ones(len(labels_T))
    d_logits_TV = gradient(logprob_entropy, *path.place((logits_TV, labels_T, 1.0, ones_T, ones_T)))
    return logprob_T.cpu(), entropy_T.cpu(), d_logits_TV


def normal(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", [0, 77, 4999])
def test_one_logit_of_minus_infinity_is_not_nan(path: Path, column, dtype):
    """0 · log 0 in the entropy, or -inf - (-inf) in its gradient."""
    logits_TV = normal(1, 5000, dtype)
    logits_TV[0, column] = -INF
    logprob_T, entropy_T, d_logits_TV = solved(path, logits_TV, torch.tensor([9]))
    exact = reference.logprob_entropy(logits_TV.double(), torch.tensor([9]))
    torch.testing.assert_close(logprob_T.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy_T.double(), exact[1], rtol=1e-6, atol=0)
    assert d_logits_TV.isfinite().all()
    assert d_logits_TV[0, column] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [*TILES, 4097, 9000])
@pytest.mark.parametrize("mask", ["-inf", "least"])
def test_a_first_block_of_minus_infinity_is_not_nan(path: Path, hidden, dtype, mask):
    """A running maximum that starts at -inf and is still -inf after the first block: exp(-inf - (-inf)). The least
    finite number, which masks use as well, overflows where it is scaled."""
    logits_TV = normal(1, 9100, dtype)
    logits_TV[0, :hidden] = -INF if mask == "-inf" else torch.finfo(dtype).min
    logprob_T, entropy_T, d_logits_TV = solved(path, logits_TV, torch.tensor([9050]))
    exact = reference.logprob_entropy(logits_TV.double(), torch.tensor([9050]))
    torch.testing.assert_close(logprob_T.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy_T.double(), exact[1], rtol=1e-6, atol=0)
    assert d_logits_TV.isfinite().all()
    assert (d_logits_TV[0, :hidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-150.0, -1e4, -1e7])
def test_a_row_far_below_0_is_not_plus_infinity(path: Path, shift, dtype):
    """A maximum that starts at 0 or at -100: every exponential is 0 then, and its logarithm infinite."""
    logits_TV = torch.full((1, 5000), shift).to(dtype)
    logprob_T, entropy_T, d_logits_TV = solved(path, logits_TV, torch.tensor([3]))
    torch.testing.assert_close(logprob_T, torch.tensor([-math.log(5000)]))
    torch.testing.assert_close(entropy_T, torch.tensor([math.log(5000)]))
    assert d_logits_TV.isfinite().all()


@pytest.mark.parametrize("margin", [17.0, 30.0, 60.0])
def test_a_near_certain_token_has_a_log_probability(path: Path, margin):
    """x_y - logsumexp(x) is exactly 0 in fp32 from a margin of 17 on, and its gradient 1 - p_y with it."""
    logits_TV = torch.zeros(1, 2)
    logits_TV[0, 1] = margin
    logprob_T, _, _ = solved(path, logits_TV, torch.tensor([1]))
    assert logprob_T.item() == pytest.approx(-math.log1p(math.exp(-margin)), rel=1e-5)
    arrives = (torch.ones(1), torch.zeros(1))
    d_logits_TV = gradient(logprob_entropy, *path.place((logits_TV, torch.tensor([1]), 1.0, *arrives)))
    assert d_logits_TV[0, 1].item() == pytest.approx(math.exp(-margin), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2049, 5001, 6150])
def test_a_ragged_vocabulary_gives_no_positive_log_probability(path: Path, vocabulary, dtype):
    """A tail that is read as 0 and not left out, where all logits are far below 0; or logsumexp rounded below the logit."""
    logits_TV = normal(3, vocabulary, dtype) - 50
    logits_TV[0, -1], logits_TV[1, 0] = 20.0, 20.0
    labels_T = torch.tensor([vocabulary - 1, 0, 7])
    logprob_T, entropy_T, _ = solved(path, logits_TV, labels_T)
    exact = reference.logprob_entropy(logits_TV.double(), labels_T)
    assert (logprob_T <= 0).all()
    assert (entropy_T >= 0).all()
    torch.testing.assert_close(logprob_T.double(), exact[0], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("alone", [True, False])
def test_the_entropys_gradient_is_not_dropped(path: Path, alone):
    """An entropy that is returned detached, or whose gradient is left out where the log-probability has one too."""
    logits_TV, labels_T = normal(2, 50), torch.tensor([1, 2])
    leaf_TV, exact_TV = path.place(logits_TV).clone().requires_grad_(), logits_TV.double().requires_grad_()
    for function, leaf, labels in (
        (logprob_entropy, leaf_TV, path.place(labels_T)),
        (reference.logprob_entropy, exact_TV, labels_T),
    ):
        logprob_T, entropy_T = function(leaf, labels)
        assert entropy_T.requires_grad
        (entropy_T.sum() if alone else 0.1 * logprob_T.sum() + entropy_T.sum()).backward()
    assert exact_TV.grad.abs().max() > 0.01
    torch.testing.assert_close(leaf_TV.grad.cpu().double(), exact_TV.grad, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_bias_d_weight(path: Path, monkeypatch):
    """Sums over chunks in bf16: where every chunk adds the same small number, those after the first few are lost in rounding."""
    rows, vocabulary, tokens = 1, 4, 128
    set_chunk_rows(monkeypatch, path, rows, vocabulary if path.backend != "triton" else 64)
    one = problem(dtype=torch.bfloat16, shape=(1, 2, vocabulary), weight_0=False, ref_logprob_T=None)
    many = one.tokens(torch.zeros(tokens, dtype=torch.long))
    _, _, d_weight_VD = by_head(many, path)
    exact_VD = by_definition(many.double())[2]
    lost = torch.zeros_like(d_weight_VD)
    for _ in range(tokens):
        lost += (exact_VD / tokens).bfloat16()
    # bf16 d_logits are the same in each chunk, and so is their rounding: 2^-9, and 2^-9 of the result.
    torch.testing.assert_close(d_weight_VD.double(), exact_VD, rtol=2**-8, atol=0)
    assert (lost.double() / exact_VD - 1).abs().max() > 0.05


def test_more_rows_than_a_grid_dimension(path: Path):
    """Rows dealt to the second dimension of a grid, of which there are 65,535: the rest is silently not computed, or an error."""
    if path.backend == "triton" and path.device == "cpu":
        pytest.skip("an hour in the interpreter: on a GPU only")
    labels_T = torch.zeros(65_537, dtype=torch.long)
    logprob_T, entropy_T = logprob_entropy(*path.place((torch.zeros(65_537, 3), labels_T)))
    torch.testing.assert_close(logprob_T.cpu(), torch.full((65_537,), -math.log(3)))
    torch.testing.assert_close(entropy_T.cpu(), torch.full((65_537,), math.log(3)))
