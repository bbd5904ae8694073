"""Memory that the native backward takes its gradient from: handed out again once it is free, and never before."""

from __future__ import annotations

import pytest
import torch

from kernels import backend
from kernels.logprob_entropy import logprob_entropy

pytestmark = pytest.mark.skipif(not backend.has_native(), reason="kernels._native is not built")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    torch.ops.keju.release_reused()
    yield
    torch.ops.keju.release_reused()


def empty(mib: int) -> torch.Tensor:
    return torch.ops.keju.empty_reused([mib, MIB // 4], torch.float32)


def test_a_freed_block_is_used_again():
    first = empty(8)
    address = first.data_ptr()
    view = first[3:]
    del first
    assert empty(8).data_ptr() != address, "a view of it was still there"
    del view
    assert empty(6).data_ptr() == address
    assert torch.ops.keju.release_reused() == 8 * MIB
    assert torch.ops.keju.release_reused() == 0


def test_two_at_a_time_are_two():
    first, second = empty(8).fill_(1), empty(8).fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()
    del first, second
    assert torch.ops.keju.release_reused() == 8 * MIB, "one is kept"


def test_a_block_of_twice_the_size_is_left_alone():
    empty(16)
    small = empty(7)
    assert torch.ops.keju.release_reused() == 16 * MIB
    del small


def test_small_and_empty_shapes():
    for shape in ([], [0, 5], [3, 7]):
        assert list(torch.ops.keju.empty_reused(shape, torch.bfloat16).shape) == shape
    assert torch.ops.keju.release_reused() == 0
    with pytest.raises(ValueError, match="shape"):
        torch.ops.keju.empty_reused([-1], torch.float32)


def test_a_gradient_that_is_kept_stays_as_it_is_while_the_next_is_formed():
    logits = torch.randn(40, 40_000)
    labels = torch.arange(40)
    gradients = []
    for scale in (1.0, 2.0, 3.0):
        leaf = logits.clone().requires_grad_()
        (logprob_entropy(leaf, labels)[0].sum() * scale).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    torch.testing.assert_close(gradients[2], 3 * gradients[0])
