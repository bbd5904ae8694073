"""A disk that is full, refuses or breaks: a save that fails leaves the last good checkpoint and nothing else, and is said."""

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_actor import checkpoints, names, same, small_actor, state_at, update, values_of
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch.distributed.checkpoint import FileSystemWriter

from rollout.errors import InputError
from rollout.types import Prompt, Verdict
from trainer import checkpoint_state, checkpoint_write
from trainer.checkpoint_tensors import Writer
from trainer.disk import refusals

pytestmark = pytest.mark.usefixtures("one_thread")


def refusing(monkeypatch, code=errno.ENOSPC):
    """Every write ends in an OSError."""

    def refuse(*_):
        raise OSError(code, os.strerror(code), "the disk")

    monkeypatch.setattr(Writer, "write_data", refuse)


def test_a_save_that_fails_is_said_and_counted_and_the_run_goes_on(mesh, run, monkeypatch):
    said, actor = [], small_actor(mesh)
    kept = checkpoints(run, said.append, max_failures=3)
    kept.resume(actor)
    with monkeypatch.context() as patch:
        refusing(patch)
        for step in (3, 4):
            kept.save(actor, state_at(step))
            kept._writing.join()
            assert kept.measured()["checkpoint/failed"] == step - 2
            assert names(run) == ["step-000001", "step-000002"]
    assert said == [
        f"checkpoint of step {step} failed: No space left on device (the disk): free space there or lower checkpoint.keep, or "
        "mend what the system says; the last good one is step-000002"
        for step in (3, 4)
    ]
    kept.save(actor, state_at(5))
    kept.finish()
    assert names(run) == ["step-000002", "step-000005"]
    with monkeypatch.context() as patch:
        refusing(patch)
        for step in (6, 7):
            kept.save(actor, state_at(step))
        kept.save(actor, state_at(8))
        with pytest.raises(InputError, match=r"step 8 failed: .*; the same command continues from .*, step-000005"):
            kept.save(actor, state_at(9))
    assert names(run) == ["step-000002", "step-000005"]


def test_a_full_disk_is_told_where_torch_raises_over_it(mesh, run, monkeypatch):
    """As torch.save does where there is space again when it closes what a full disk interrupted."""

    def raise_over(*_):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(FileSystemWriter, "write_data", raise_over)
    with pytest.raises(InputError, match=r"checkpoint of step 3 failed: No space left on device \(the disk\)"):
        checkpoints(run).save(small_actor(mesh), state_at(3), wait=True)
    assert names(run) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_that_ends_the_run(mesh, run, monkeypatch, asynchronous):
    """The last of the run, one before a stop, and the last of too many in a row."""
    actor = small_actor(mesh)
    refusing(monkeypatch, errno.EROFS)

    def fresh(**config):
        kept = checkpoints(run, asynchronous=asynchronous, **config)
        kept.resume(actor)
        return kept

    kept = fresh()
    kept.save(actor, state_at(3))
    with pytest.raises(InputError, match="Read-only file system"):
        kept.finish()
    with pytest.raises(InputError, match="checkpoint of step 3 failed"), fresh() as kept:
        kept.save(actor, state_at(3))
    with pytest.raises(InputError, match="checkpoint of step 3 failed"):
        fresh().save(actor, state_at(3), wait=True)
    kept = fresh(max_failures=1)
    if asynchronous:
        kept.save(actor, state_at(3))
    with pytest.raises(InputError, match="checkpoint of step 3 failed"):
        kept.save(actor, state_at(4 if asynchronous else 3))
    said = []
    kept = checkpoints(run, said.append, asynchronous=asynchronous)
    kept.save(actor, state_at(3))
    with pytest.raises(ZeroDivisionError), kept:
        raise ZeroDivisionError  # what ends the run stays what is raised
    assert len(said) == 1
    assert names(run) == ["step-000001", "step-000002"]


def test_a_defect_while_writing_is_raised(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_write, "publish", lambda *_: 1 / 0)
    kept = checkpoints(tmp_path)
    kept.save(small_actor(mesh), state_at(1))
    with pytest.raises(ZeroDivisionError):
        kept.save(small_actor(mesh), state_at(2))


def test_an_old_checkpoint_that_cannot_be_removed_is_said(mesh, run, monkeypatch):
    said = []
    kept = checkpoints(run, said.append, keep=1)

    def refuse(folder):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr("trainer.checkpoint.discard", refuse)
    kept.save(small_actor(mesh), state_at(3), wait=True)
    assert [line.split(":")[0] for line in said] == ["an old checkpoint cannot be removed"]
    assert kept.measured()["checkpoint/failed"] == 0


def test_an_old_checkpoint_that_is_removed_in_part_fails_no_later_save(mesh, run, monkeypatch):
    said, actor, plain = [], small_actor(mesh), shutil.rmtree

    def refuse(path, *arguments, **options):
        if str(path).endswith("step-000001.old.tmp"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        plain(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    kept = checkpoints(run, said.append, keep=2)
    kept.resume(actor)
    for step in (3, 4, 5, 6):
        kept.save(actor, state_at(step), wait=True)
    assert kept.measured()["checkpoint/failed"] == 0
    assert names(run) == ["step-000001.old.tmp", "step-000005", "step-000006"]
    assert [line.split(":")[0] for line in said] == ["an old checkpoint cannot be removed"]


def test_later_checkpoints_that_came_after_the_start_are_left_alone(mesh, run, tmp_path):
    """A disk that was mounted over the folder while the run, which saw none, began anew."""
    said, actor = [], small_actor(mesh)
    kept = checkpoints(tmp_path / "late", said.append, keep=1)
    assert kept.resume(actor).step == 0
    shutil.copytree(run / "checkpoints", tmp_path / "late/checkpoints")
    (tmp_path / "late/checkpoints/step-000002").rename(tmp_path / "late/checkpoints/step-000820")
    (tmp_path / "late/checkpoints/step-000001").rename(tmp_path / "late/checkpoints/step-000005")
    for step in (3, 4):
        kept.save(actor, state_at(step), wait=True)
    assert names(tmp_path / "late") == ["step-000004", "step-000005", "step-000820"]
    with pytest.raises(InputError, match=r"checkpoint of step 5 failed: .*step-000005 is there, and is not this run's: move it"):
        kept.save(actor, state_at(5), wait=True)
    kept.save(actor, state_at(6), wait=True)
    assert names(tmp_path / "late") == ["step-000005", "step-000006", "step-000820"], "nor do they push its own out"
    others = [line.split("checkpoints/")[1] for line in said if "left alone" in line]
    assert others == [
        f"{name} was not there when this run started, and is not its own: left alone" for name in ("step-000005", "step-000820")
    ], "once each"


def test_a_checkpoint_of_steps_whose_rows_are_nowhere_does_not_stand(mesh, run):
    said, actor = [], small_actor(mesh)
    kept = checkpoints(run, said.append)
    kept.resume(actor)
    kept.save(actor, state_at(3), hindrance="RUN/metrics.jsonl: 2 rows cannot be written")
    assert names(run) == ["step-000001", "step-000002"]
    assert said[0].startswith("checkpoint of step 3 failed: RUN/metrics.jsonl: 2 rows cannot be written: free space there")
    with pytest.raises(InputError, match="2 rows cannot be written"):
        kept.save(actor, state_at(4), True, "RUN/metrics.jsonl: 2 rows cannot be written")
    kept.save(actor, state_at(5), wait=True)
    assert "step-000005" in names(run)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_before_the_state_is_a_failed_save_and_no_defect(mesh, run, monkeypatch, asynchronous):
    """safetensors raises an error of its own."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    said, actor = [], small_actor(mesh)
    kept = checkpoints(run, said.append, asynchronous=asynchronous)
    kept.resume(actor)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_state, "save_file", full)
        kept.save(actor, state_at(3))
        with pytest.raises(InputError, match=r"step 3 failed: No space left on device \(.*step-000003.tmp/arrays.safetensors\)"):
            kept.finish()
    assert names(run) == ["step-000001", "step-000002"]
    kept.save(actor, state_at(4), wait=True)
    assert "step-000004" in names(run)


def test_half_a_surrogate_pair_is_kept_as_it_is(mesh, tmp_path):
    """From an id, from a prompt's metadata, from a judge's reason: no file takes it as it stands, and every save would fail."""
    state, actor = state_at(1), small_actor(mesh)
    half = "a \ud83d half 思"
    group = replace(state.buffer[0], prompt=Prompt(half, "?", "!", metadata={half: [half]}))
    state.buffer = [replace(group, verdicts=(Verdict(True, "right", half), Verdict(False, "wrong")))]
    checkpoints(tmp_path).save(actor, state, wait=True)
    (found,) = checkpoints(tmp_path).resume(actor).buffer
    assert (found.prompt, found.verdicts) == (state.buffer[0].prompt, state.buffer[0].verdicts)


def test_what_safetensors_meets_on_a_full_disk_is_an_os_error(small_disk, tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, refusals(small_disk / "file"):
        save_file({"a": np.zeros(1 << 20)}, small_disk / "file")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(small_disk / "file"))
    with pytest.raises(FileNotFoundError), refusals(tmp_path / "no folder/file"):
        save_file({"a": np.zeros(1)}, tmp_path / "no folder/file")
    with pytest.raises(SafetensorError), refusals(tmp_path / "file"):
        raise SafetensorError("of another kind")


@pytest.fixture
def small_disk(mounted):
    """A file system of 2 MB; a checkpoint takes 0.3."""
    return mounted("2m")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_disk_that_is_full(mesh, small_disk, monkeypatch, when, asynchronous):
    """The last good checkpoint stays whole, nothing half-written stays, and when there is space again the next save stands."""
    said, actor = [], small_actor(mesh)
    kept = checkpoints(small_disk, said.append, keep=1, asynchronous=asynchronous)
    monkeypatch.setattr("trainer.checkpoint.ROOM", 0)
    if when == "in the middle":
        monkeypatch.setattr("trainer.checkpoint.free_bytes", lambda _: 1 << 40)
    kept.save(actor, state_at(1), wait=True)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - (200 << 10)))
    update(actor)
    kept.save(actor, state_at(2))
    if kept._writing is not None:
        kept._writing.join()
    kept.measured()
    assert len(said) == 1
    expected = "No space left on device" if when == "in the middle" else "GB free, and it takes"
    assert said[0].startswith("checkpoint of step 2 failed: ")
    assert expected in said[0]
    assert names(small_disk) == ["step-000001"]
    again = small_actor(mesh)
    assert checkpoints(small_disk, said.append).resume(again).step == 1
    filler.unlink()
    kept.save(actor, state_at(3), wait=True)
    assert names(small_disk) == ["step-000003"]
    checkpoints(small_disk).resume(again)
    assert same(values_of(again), values_of(actor))
