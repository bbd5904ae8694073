"""Checkpoints of one process: what is saved and read again, and what damage and foreign files do.

What it proves: values reach the disk as they were when `save` was called; a damaged checkpoint is never taken, a foreign one
never executed; a save that fails leaves the last good checkpoint and nothing else. What it does not: several ranks
(test_checkpoint_ranks.py), kills (test_checkpoint_kills.py), a GPU's copies.
"""

import json
import os
import pickle
import threading
import time

import pytest
import torch
from checkpoint_actor import checkpoints, names, same, small_actor, state_at, update, values_of
from tiny_policy import OBJECTIVES, build_actor, stage
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from rollout.errors import InputError
from trainer import checkpoint_tensors, checkpoint_write
from trainer.checkpoint_folder import describe, folders_of
from trainer.checkpoint_tensors import Reader, Staging, tensors_of
from trainer.checkpoint_weights import CheckpointWeights

pytestmark = pytest.mark.usefixtures("one_thread")


def rewrite(folder, name, content):
    """A file of a checkpoint, and the manifest so that it passes."""
    (folder / name).write_bytes(content)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps(describe(folder, files)))


def test_what_is_saved_is_read(mesh, saved):
    run, values = saved
    actor, kept = small_actor(mesh), checkpoints(run)
    state, expected = kept.resume(actor), state_at(2)
    assert (state.step, state.ledger, state.sources, actor.updates) == (2, expected.ledger, expected.sources, 2)
    assert same(values_of(actor), values[2])
    assert not same(values[1], values[2])
    for group, other in zip(state.buffer, expected.buffer, strict=True):
        assert (group.prompt, group.verdicts, group.drawn_step) == (other.prompt, other.verdicts, other.drawn_step)
        for one, two in zip(group.samples, other.samples, strict=True):
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert one.logprobs.tolist() == two.logprobs.tolist()
            assert (one.finish_reason, one.weight_version) == (two.finish_reason, two.weight_version)


def test_nothing_but_tensors_lies_in_the_tensors_folder(saved):
    """What else torch would store it would read back by plain pickle."""
    index = Reader(saved[0] / "checkpoints/step-000002").read_metadata()
    assert len(index.state_dict_metadata) > 50
    assert not any(isinstance(each, BytesStorageMetadata) for each in index.state_dict_metadata.values())
    content = (saved[0] / "checkpoints/step-000002/dcp/.metadata").read_bytes()
    assert str(saved[0]).encode() not in content, "a checkpoint names no path of the machine that wrote it"


FILES = ("manifest.json", "state.json", "arrays.safetensors", "dcp/.metadata", "dcp/__0_0.distcp")


@pytest.mark.parametrize("what", ["cut", "emptied", "first bit", "middle bit", "last bit", "longer", "gone", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(mesh, saved, run, name, what):
    assert sorted(FILES) == sorted(
        str(path.relative_to(run / "checkpoints/step-000002"))
        for path in (run / "checkpoints/step-000002").rglob("*")
        if path.is_file()
    )
    path = run / "checkpoints/step-000002" / name
    content = bytearray(path.read_bytes())
    if what == "cut":
        path.write_bytes(content[:-1])
    elif what == "emptied":
        path.write_bytes(b"")
    elif what.endswith("bit"):
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[what.removesuffix(" bit")]] ^= 1
        path.write_bytes(content)
    elif what == "longer":
        path.write_bytes(content + b"}")
    else:
        path.unlink()
        if what == "a folder":
            path.mkdir()
    said = []
    actor = small_actor(mesh)
    assert checkpoints(run, said.append).resume(actor).step == 1
    assert same(values_of(actor), saved[1][1])
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-000002 skipped: ")
    assert name in said[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(mesh, run):
    for step in (1, 2):
        (run / f"checkpoints/step-00000{step}/state.json").write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint is whole \(step-000002: state.json .*step-000001: state.json .*begin"):
        checkpoints(run).resume(small_actor(mesh))
    assert names(run) == ["step-000001", "step-000002"]


def test_a_run_without_checkpoints_begins(mesh, tmp_path):
    (tmp_path / "checkpoints/step-000003.tmp").mkdir(parents=True)
    assert checkpoints(tmp_path).resume(small_actor(mesh)).step == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "state.json",
            b'{"format": 7}',
            "state.json: format 7, and this version reads 2: continue with the version that wrote",
        ),
        ("state.json", b'{"format": 2, "step": 2}', "state.json or arrays.safetensors does not hold a run's state"),
        ("state.json", b"[]", "state.json or arrays.safetensors does not hold a run's state"),
        ("state.json", b"\xff\xfe", "state.json or arrays.safetensors does not hold a run's state"),
        ("arrays.safetensors", b"", "state.json or arrays.safetensors does not hold a run's state"),
        ("dcp/.metadata", b"", r"\.metadata: refused: "),
        ("dcp/.metadata", pickle.dumps([1]), r"\.metadata: refused: it is no index of a checkpoint"),
        ("dcp/__0_0.distcp", b"x" * 400000, r"dcp: cannot be read \("),
    ],
)
def test_a_file_that_its_manifest_confirms_and_nobody_can_read(mesh, run, name, content, said):
    rewrite(run / "checkpoints/step-000002", name, content)
    with pytest.raises(InputError, match=said) as caught:
        checkpoints(run).resume(small_actor(mesh))
    assert "step-000002" in str(caught.value)


def test_a_checkpoint_of_another_size_is_refused(mesh, run):
    tensors = {name: tensor for name, tensor in tensors_of(small_actor(mesh)).items() if name.endswith("lm_head.weight")}
    assert tensors
    wrong = {name: torch.zeros(60, 24) for name in tensors}
    with pytest.raises(InputError, match=r"lm_head.weight has the sizes \[61, 24\], and this run's is torch.float32 \[60, 24\]"):
        checkpoint_tensors.check_kinds(run / "checkpoints/step-000002", wrong)


class Planted:
    """What pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def index_with(folder, change):
    """A checkpoint's index after `change`, pickled."""
    index = Reader(folder).read_metadata()
    change(index)
    return pickle.dumps(index)


def test_a_planted_index_is_refused_and_not_run(mesh, run, tmp_path):
    folder = run / "checkpoints/step-000002"
    honest = (folder / "dcp/.metadata").read_bytes()
    planted = [pickle.dumps(Planted(tmp_path / "run by pickle"))]
    planted.append(index_with(folder, lambda index: setattr(index, "planner_data", Planted(tmp_path / "run by pickle"))))
    planted.append(
        index_with(folder, lambda index: setattr(index.storage_meta, "modules", [Planted(tmp_path / "run by pickle")]))
    )
    for content in planted:
        rewrite(folder, "dcp/.metadata", content)
        for read in (lambda: checkpoints(run).resume(small_actor(mesh)), lambda: CheckpointWeights(folder, tied=False)):
            with pytest.raises(InputError, match=r"step-000002/dcp/\.metadata: refused: it names posix\.mkdir"):
                read()
        assert not (tmp_path / "run by pickle").exists()
    pickle.loads(planted[0])
    assert (tmp_path / "run by pickle").exists(), "the planted index would have run"
    rewrite(folder, "dcp/.metadata", honest)
    assert checkpoints(run).resume(small_actor(mesh)).step == 2


def test_an_index_cannot_have_a_weight_read_by_pickle(mesh, run, tmp_path):
    """BytesStorageMetadata for the name of a weight: torch would then load what lies there with weights_only=False."""
    folder = run / "checkpoints/step-000002"

    def change(index: Metadata):
        name = next(iter(index.state_dict_metadata))
        index.state_dict_metadata[name] = BytesStorageMetadata()

    rewrite(folder, "dcp/.metadata", index_with(folder, change))
    with pytest.raises(InputError, match=r"refused: it names torch\.distributed\.checkpoint\.metadata\.BytesStorageMetadata"):
        checkpoints(run).resume(small_actor(mesh))


def test_an_index_cannot_lead_out_of_the_checkpoint(mesh, run):
    folder = run / "checkpoints/step-000002"

    def change(index: Metadata):
        next(iter(index.storage_data.values())).relative_path = "../../../secret"

    rewrite(folder, "dcp/.metadata", index_with(folder, change))
    with pytest.raises(InputError, match=r"lies in '\.\./\.\./\.\./secret', which the manifest does not name"):
        checkpoints(run).resume(small_actor(mesh))


class Gate:
    """Holds every write up until it is opened."""

    def __init__(self, monkeypatch):
        self._open = threading.Event()
        write = checkpoint_tensors.write

        def held(*arguments):
            assert self._open.wait(60)
            write(*arguments)

        monkeypatch.setattr(checkpoint_tensors, "write", held)

    def open(self):
        self._open.set()


def test_what_changes_after_save_does_not_reach_the_disk(mesh, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    actor, kept, state = small_actor(mesh), checkpoints(tmp_path), state_at(1)
    update(actor)
    torch.rand(5)  # or the random state would be that of any actor just built
    before = values_of(actor)
    kept.save(actor, state)
    assert names(tmp_path) in ([], ["step-000001.tmp"]), "save returned while nothing was written"
    update(actor)
    with torch.no_grad():
        for state_of_one in actor.optimizer.state.values():
            for value in state_of_one.values():
                value.fill_(7)
    drawn = torch.rand(3)
    state.step = 9
    state.ledger.drawn = 9999
    state.sources["train.jsonl"]["position"] = 9999
    state.buffer[0].samples[0].token_ids[:] = 9999
    state.buffer.pop()
    gate.open()
    kept.finish()
    again, expected = small_actor(mesh), state_at(1)
    found = checkpoints(tmp_path).resume(again)
    assert same(values_of(again), before)
    assert (found.step, found.ledger, found.sources, again.updates) == (1, expected.ledger, expected.sources, 1)
    assert [group.samples[0].token_ids.tolist() for group in found.buffer] == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(torch.rand(3), drawn)


def test_staged_copies_share_no_memory_and_are_used_again(mesh):
    actor = build_actor(mesh, stage(OBJECTIVES["untied"]), tied=True)
    tensors, staging = tensors_of(actor), Staging()
    first = staging.copy(tensors)
    held = {name: checkpoint_tensors.local(copy).data_ptr() for name, copy in first.items()}
    own = {checkpoint_tensors.local(tensor).untyped_storage().data_ptr() for tensor in tensors.values()}
    assert own.isdisjoint(held.values())
    head, embedding = (f"model.causal_lm.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    assert held[head] == held[embedding], "tied weights are one copy"
    assert len(set(held.values())) == len(held) - 1
    update(actor)
    second = staging.copy(tensors_of(actor))
    assert {name: checkpoint_tensors.local(copy).data_ptr() for name, copy in second.items()} == held
    for name, tensor in tensors_of(actor).items():
        assert torch.equal(checkpoint_tensors.local(second[name]), checkpoint_tensors.local(tensor))
        assert (second[name].shape, second[name].dtype, type(second[name])) == (tensor.shape, tensor.dtype, type(tensor))


def test_the_loop_waits_for_the_copy_and_not_for_the_disk(mesh, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    actor, kept = small_actor(mesh), checkpoints(tmp_path)
    start = time.perf_counter()
    kept.save(actor, state_at(1))
    stall = time.perf_counter() - start
    time.sleep(5 * stall)  # a slow disk
    gate.open()
    kept.finish()
    measured = kept.measured()
    assert 0 < measured["time/checkpoint"] <= stall
    assert measured["time/checkpoint_write"] > 5 * measured["time/checkpoint"]
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step-000001").rglob("*") if path.is_file())
    assert measured["checkpoint/bytes"] == size - (tmp_path / "checkpoints/step-000001/manifest.json").stat().st_size
    assert measured["checkpoint/failed"] == 0
    assert kept.measured() == {}


def test_the_next_save_waits_for_the_one_before(mesh, tmp_path, monkeypatch):
    gate, before = Gate(monkeypatch), []
    join = checkpoint_write.Write.join

    def opened(write, timeout=None):
        if not before:
            before.append(names(tmp_path))
            gate.open()
        join(write, timeout)

    monkeypatch.setattr(checkpoint_write.Write, "join", opened)
    actor, kept = small_actor(mesh), checkpoints(tmp_path)
    kept.save(actor, state_at(1))
    kept.save(actor, state_at(2))
    assert len(before) == 1
    assert "step-000001" not in before[0], "there was something to wait for"
    assert "step-000001" in names(tmp_path)
    kept.finish()
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_context_that_ends_finishes_what_is_written(mesh, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    kept = checkpoints(tmp_path)
    kept.save(small_actor(mesh), state_at(1))
    gate.open()
    with pytest.raises(KeyboardInterrupt), kept:
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step-000001"]


def test_written_at_once_where_that_is_asked(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(Staging, "copy", lambda *_: pytest.fail("nothing changes meanwhile: no copy is needed"))
    kept = checkpoints(tmp_path, asynchronous=False)
    kept.save(small_actor(mesh), state_at(1))
    assert names(tmp_path) == ["step-000001"]
    kept = checkpoints(tmp_path)
    kept.save(small_actor(mesh), state_at(2), wait=True)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_step_that_stands_is_not_written_again(mesh, run, monkeypatch):
    """To replace it would leave an instant without it."""
    kept, actor = checkpoints(run, keep=1), small_actor(mesh)
    assert kept.resume(actor).step == 2
    monkeypatch.setattr(checkpoint_tensors, "write", lambda *_: pytest.fail("written again"))
    kept.save(actor, state_at(2), wait=True)
    assert names(run) == ["step-000001", "step-000002"]


def test_a_damaged_one_of_the_same_step_is_replaced(mesh, run):
    (run / "checkpoints/step-000002/state.json").write_text("{}")
    kept, actor = checkpoints(run, keep=1), small_actor(mesh)
    assert kept.resume(actor).step == 1
    kept.save(actor, state_at(2), wait=True)
    assert names(run) == ["step-000002"]
    assert checkpoints(run).resume(actor).step == 2


def test_which_stay_when_a_new_one_stands(mesh, tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.3, 5: 0.5, 6: None, 7: 0.2}
    actor, seen = small_actor(mesh), []
    for step in range(1, 8):
        # Anew each time, as after a stop.
        kept = checkpoints(tmp_path, keep=2, keep_every=4, keep_best=True, score=scores.get)
        kept.save(actor, state_at(step), wait=True)
        seen.append([folder.name[-1] for folder in folders_of(tmp_path / "checkpoints")])
    assert seen == [["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"], ["2", "4", "5", "6"], ["2", "4", "6", "7"]]
