"""What several files of tests need of a policy on one rank, and of a run with two checkpoints."""

import shutil

import pytest
import torch
from checkpoint_actor import checkpoints, small_actor, state_at, update, values_of
from tiny_policy import one_rank


@pytest.fixture(scope="module")
def one_thread():
    """As processes of several ranks have: where a vectorised function's tail falls, which has other roundings, depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """(run folder with the checkpoints of steps 1 and 2, the values at each)."""
    run = tmp_path_factory.mktemp("saved")
    actor, kept = small_actor(mesh), checkpoints(run)
    values = {}
    for step in (1, 2):
        update(actor)
        kept.save(actor, state_at(step), wait=True)
        values[step] = values_of(actor)
    return run, values


@pytest.fixture
def run(saved, tmp_path):
    """A copy of `saved`."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"
