"""Checkpoints of several ranks: read on another number of them, written once where the model has copies, failing on all alike.

What it proves: saved on 4 ranks while the training went on, and resumed on 1, 2 and 8, where some ranks hold no row of some
weights: the same ledger, and in the next updates the losses and the weights of the ranks that stayed, to fp32 rounding. With
adamw8bit too: its blocks lie within rows, so codes are read on any number. What it does not: bf16 weights, whose rounding draws
from the shards' own seeds, NCCL, or pinned memory.
"""

import os
import subprocess
import sys
from pathlib import Path

import checkpoint_ranks
import pytest
import torch
from checkpoint_actor import STAGE, checkpoints, same, small_actor, state_at, values_of
from checkpoint_ranks import KINDS, RESUMED_ON, UPDATES
from tiny_policy import one_rank

from trainer.checkpoint_folder import folders_of

TOLERANCE = 1e-5
"""As in test_rank_invariance.py."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `checkpoint_ranks` left."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, checkpoint_ranks.__file__, str(folder)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(folder, name):
    return torch.load(folder / f"{name}.pt")


def far(one, other):
    """Root mean square of the difference, over the weights of each name."""
    return {name: (one[name] - other[name]).square().mean().sqrt().item() for name in one}


@pytest.mark.parametrize("ranks", RESUMED_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_on_four_ranks_and_resumed_on_another_number(folder, kind, ranks):
    stayed, resumed = found(folder, "stayed")[kind], found(folder, f"on {ranks}")[kind]
    expected = state_at(UPDATES)
    assert resumed["ledger"] == expected.ledger.as_dict()
    assert (resumed["step"], resumed["buffer"]) == (UPDATES, len(expected.buffer))
    assert len(stayed["updates"]) == len(resumed["updates"]) == UPDATES
    for one, other in zip(stayed["updates"], resumed["updates"], strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE, abs=1e-6)
    assert stayed["updates"][0]["policy_loss"] != pytest.approx(stayed["updates"][1]["policy_loss"], rel=1e-3), "it learns"
    bound = {"adamw": 1e-3, "adamw8bit": 1e-2}[kind] * STAGE.actor.lr * UPDATES
    for name, distance in far(stayed["weights"], resumed["weights"]).items():
        assert distance < bound, name


def test_copies_of_the_model_are_written_once(folder):
    """Two copies of two shards take what four shards take, and one rank reads them."""
    sizes = {}
    for name in ("adamw", "copies"):
        [checkpoint] = folders_of(folder / name / "checkpoints")
        sizes[name] = sum(path.stat().st_size for path in (checkpoint / "dcp").glob("*.distcp"))
    assert sizes["copies"] < 1.1 * sizes["adamw"]
    with one_rank() as mesh:
        pair = [small_actor(mesh) for _ in range(2)]
        for actor, name in zip(pair, sizes, strict=True):
            assert checkpoints(folder / name).resume(actor).step == UPDATES
        one, other, fresh = (values_of(actor) for actor in (*pair, small_actor(mesh)))
    assert not same(one, fresh)
    assert max((one[name].double() - other[name].double()).abs().max().item() for name in one) < 1e-4


def test_where_one_rank_fails_all_do(folder):
    result = found(folder, "failing")
    first, second = result["outcomes"]
    assert first == second
    assert first[0] == "went on"
    for outcome, rank, step in ((first[1], 1, 3), (first[2], 0, 4)):
        assert outcome.startswith(
            f"checkpoint of step {step} failed: rank {rank}: No space left on device (the disk): free space"
        )
        assert outcome.endswith("the same command continues from the last good one, step-000001")
    assert [len(said) for said in result["said"]] == [3, 3]
    assert result["left"] == ["step-000001"]


def test_what_any_rank_finds_damaged_all_skip(folder):
    result = found(folder, "damaged")
    assert result["steps"] == [1, 1]
    first, second = result["said"]
    assert [line.split(" skipped: ")[0] for line in first] == ["checkpoint step-000003", "checkpoint step-000002"]
    assert all("does not match its checksum" in line for line in first)
    assert second == []
