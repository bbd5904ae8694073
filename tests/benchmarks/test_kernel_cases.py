"""The work a case is said to need, the grid, and the floors that follow from them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import (
    BACKWARD,
    BOTH,
    BOTH_INPLACE,
    FORWARD,
    Case,
    bytes_to_move,
    check,
    gradient_bytes,
    grid,
    input_bytes,
    operations_to_do,
)
from benchmarks.kernels.floor import COPY, best_gemms, copied_bytes, floor_milliseconds
from benchmarks.kernels.results import throughput
from benchmarks.kernels.timing import Spread

TABLE = 8192 * 152_064 * 2


def spread(milliseconds: float) -> Spread:
    return Spread(milliseconds, milliseconds, milliseconds, 5)


@pytest.mark.parametrize(("mode", "passes"), [(FORWARD, 1), (BACKWARD, 2), (BOTH, 3), (BOTH_INPLACE, 3)])
def test_bytes_are_the_table_once_for_each_pass_and_little_else(mode, passes):
    moved = bytes_to_move(Case("logprob_entropy", mode, 8192, 152_064))
    assert passes * TABLE < moved < passes * TABLE * 1.001


def test_bytes_by_hand():
    assert bytes_to_move(Case("logprob_entropy", FORWARD, 2, 10, dtype="float32")) == 2 * 10 * 4 + 2 * 16
    assert bytes_to_move(Case("clipped_policy_loss", BOTH, 100, dtype="float32")) == 2800
    assert bytes_to_move(Case("linear_policy_loss", BOTH, 8, 16, 4)) is None
    assert input_bytes(Case("linear_policy_loss", BOTH, 8, 16, 4)) == (8 + 16) * 4 * 2
    assert gradient_bytes(Case("logprob_entropy", FORWARD, 8, 16)) == 0
    assert gradient_bytes(Case("logprob_entropy", BOTH, 8, 16)) == 8 * 16 * 2


@pytest.mark.parametrize(
    ("operation", "mode", "gemms"),
    [("linear_logprob_entropy", FORWARD, 1), ("linear_logprob_entropy", BOTH, 3), ("linear_policy_loss", BOTH, 3)],
)
def test_operations_by_gemm(operation, mode, gemms):
    assert operations_to_do(Case(operation, mode, 3, 5, 7)) == gemms * 2 * 3 * 5 * 7
    assert operations_to_do(Case("logprob_entropy", FORWARD, 3, 5)) is None


def test_the_floor_is_the_bytes_at_the_copys_bandwidth():
    case = Case("logprob_entropy", FORWARD, 8192, 152_064)
    assert copied_bytes(case) == 2 * TABLE
    assert floor_milliseconds(case, {COPY: spread(2.0)}) == pytest.approx(1.0, rel=1e-3)
    assert throughput(case, 1.0) == "2,491.5 GB/s"


def test_the_floor_of_a_head_is_each_gemm_at_its_best():
    measured = {
        "GEMM logits, bf16": spread(3.0),
        "GEMM d_hidden, bf16": spread(5.0),
        "GEMM d_weight, bf16": spread(9.0),
        "GEMM d_weight, bf16 into fp32": spread(7.0),
    }
    assert best_gemms(measured) == {"logits": 3.0, "d_hidden": 5.0, "d_weight": 7.0}
    assert floor_milliseconds(Case("linear_logprob_entropy", FORWARD, 1, 1, 1), measured) == 3.0
    assert floor_milliseconds(Case("linear_policy_loss", BOTH, 1, 1, 1), measured) == 15.0
    assert floor_milliseconds(Case("linear_logprob_entropy", BOTH, 1, 1, 1), measured) == 15.0
    assert floor_milliseconds(Case("clipped_policy_loss", BOTH, 1), {}) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("effort", ["quick", "full"])
def test_every_case_of_a_grid_exists_and_stands_once(device, effort):
    cases = grid(effort, device)
    assert [check(case) for case in cases] == [None] * len(cases)
    assert len(set(cases)) == len(cases)


def test_the_full_grid_begins_with_the_shapes_that_matter_most():
    cases = grid("full", "cuda")
    assert (cases[0].tokens, cases[0].vocabulary) == (8192, 152_064)
    first_linear = next(case for case in cases if case.is_linear)
    assert (first_linear.operation, first_linear.tokens, first_linear.hidden) == ("linear_policy_loss", 16_384, 5120)
    assert {case.tokens for case in cases if case.takes_logits} == {512 * 2**power for power in range(8)}


def test_a_case_knows_what_it_lacks():
    assert check(Case("logprob_entropy", FORWARD, 8)) == "vocabulary: logprob_entropy needs a positive number, got 0"
    assert check(Case("logprob_entropy", FORWARD, 8, 8, 8)) == "hidden: logprob_entropy needs none, got 8"
    assert Case("logprob_entropy", FORWARD, 8, 16).torch_dtype is torch.bfloat16
