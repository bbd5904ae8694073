"""Each attention kernel that a GPU has against eager attention in fp64, one sequence at a time: outputs and gradients.

It shows that varlen, flash and sdpa agree with the definition up to bf16's rounding (the bound is a multiple of the error that
the same definition makes when it is computed in bf16), that no document sees another, and that gradients reach grouped keys and
values whole. What CPUs can show of sdpa's packing is in test_attention.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout.errors import InputError
from trainer.attention import Attention, SequenceLayout, attention_kernel, flash_fault, has_varlen, packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

LENGTHS = {"one": [257], "single tokens": [1, 1, 1], "wildly different": [1, 1031, 2, 300, 1024, 1, 129, 768, 5]}
HEADS = {"28 to 4, the 7B's": (28, 4, 128), "12 to 2, the 1.5B's": (12, 2, 128), "alike, of 64": (4, 4, 64)}
FACTOR = 4.0
"""Times the error of bf16's own eager attention. Kernels sum in fp32 and round once more or less than it."""


def kernel_or_skip(wanted: str) -> str:
    try:
        return attention_kernel(wanted, torch.device("cuda"), torch.bfloat16)
    except InputError as error:
        pytest.skip(str(error))


def inputs(lengths: list[int], heads: tuple[int, int, int]) -> list[Tensor]:
    """query, key, value [1, heads, T, d] and the output's gradient [1, T, heads, d], all exact in bf16."""
    query_heads, key_heads, dimension = heads
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(lengths)
    shapes = [
        (1, query_heads, total, dimension), (1, key_heads, total, dimension), (1, key_heads, total, dimension),
        (1, total, query_heads, dimension),
    ]  # fmt: skip
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]


def eager(tensors: list[Tensor], lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Softmax(q kᵀ · scale + causal mask) v for each sequence by itself → output and the three gradients."""
    query, key, value, d_output = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (leaf[0, :, start : start + length] for leaf in leaves)
        k, v = (tensor.repeat_interleave(groups, 0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
        hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += length
    output = torch.cat(outputs).unsqueeze(0)
    output.backward(d_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def packed(kernel: str, tensors: list[Tensor], lengths: list[int]) -> list[Tensor]:
    *leaves, d_output = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    layout = SequenceLayout.of(lengths, torch.device("cuda"), Attention(kernel))
    scale = leaves[0].shape[-1] ** -0.5
    output, _ = packed_attention(torch.nn.Identity(), *leaves, None, scaling=scale, layout=layout)
    output.backward(d_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kernel", ["varlen", "flash", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", LENGTHS)
def test_each_kernel_is_as_exact_as_bf16_allows(name, heads, kernel):
    kernel, lengths = kernel_or_skip(kernel), LENGTHS[name]
    tensors = inputs(lengths, HEADS[heads])
    exact, rounded = (eager(tensors, lengths, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = packed(kernel, tensors, lengths)
    for what, got, own, true in zip(("output", "d_query", "d_key", "d_value"), found, rounded, exact, strict=True):
        assert got.shape == true.shape
        if float(true.norm()) < 1e-6:  # tokens that attend to themselves alone: queries and keys have no gradient
            assert float(got.double().norm()) <= 1e-2 * float(exact[3].norm()), what
        else:
            assert error(got, true) <= FACTOR * error(own, true) + 1e-3, what


@pytest.mark.parametrize("kernel", ["varlen", "flash", "sdpa"])
def test_documents_do_not_see_each_other(kernel):
    """Another first sequence changes nothing in the others, bit for bit."""
    kernel, lengths = kernel_or_skip(kernel), [300, 17, 900]
    tensors = inputs(lengths, HEADS["12 to 2, the 1.5B's"])
    before = packed(kernel, tensors, lengths)[0]
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed[:3]:
        tensor[:, :, :300] = -tensor[:, :, :300] + 1
    after = packed(kernel, changed, lengths)[0]
    assert torch.equal(before[:, 300:], after[:, 300:])
    assert not torch.equal(before[:, :300], after[:, :300])


def test_auto_takes_the_fastest_that_is_there():
    best = "flash" if flash_fault() is None else "varlen" if has_varlen() else "sdpa"
    assert attention_kernel("auto", torch.device("cuda"), torch.bfloat16) == best
    assert attention_kernel("auto", torch.device("cuda"), torch.float32) == "sdpa"
