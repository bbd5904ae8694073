"""The fixture that runs a test once for every way to compute the loss head's operations."""

from __future__ import annotations

from collections.abc import Iterator

import kernel_paths
import pytest


@pytest.fixture(params=kernel_paths.PATHS, ids=lambda path: path.name, scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[kernel_paths.Path]:
    """Chosen while the test runs: Triton (interpreted where there is no GPU), each CPU instruction set, PyTorch, CUDA C++."""
    with request.param.chosen() as chosen:
        yield chosen
