"""Which checkpoints stay and which one is taken, with folders that hold next to nothing."""

import errno
import os

import pytest

from rollout.errors import InputError
from trainer import checkpoint_folder
from trainer.checkpoint_folder import (
    NEEDED,
    TENSORS,
    best_of,
    clear_unfinished,
    complete_checkpoint,
    create,
    damage,
    describe,
    discard,
    folders_of,
    kept,
    name_of,
    newest_whole,
    publish,
)


def write(checkpoints, step, content="x"):
    final = checkpoints / name_of(step)
    beside = final.with_name(final.name + ".tmp")
    create(beside)
    for name in NEEDED:
        (beside / name).write_text(f"{name} of {step}: {content}")
    publish(beside, final, describe(beside, [beside / name for name in NEEDED]))
    return final


@pytest.mark.parametrize(
    ("steps", "newest", "rules", "stay"),
    [
        ([10], 10, {"last": 1}, {10}),
        ([10, 20, 30, 40], 40, {"last": 2}, {30, 40}),
        ([10, 20, 30, 40], 40, {"last": 9}, {10, 20, 30, 40}),
        ([10, 20, 30, 40, 50], 50, {"last": 1, "every": 20}, {20, 40, 50}),
        ([10, 20, 30, 40], 40, {"last": 1, "best": 20}, {20, 40}),
        ([10, 20, 30, 40], 40, {"last": 2, "best": 40}, {30, 40}),
        ([10, 20, 30, 40], 40, {"last": 1, "every": 30, "best": 10}, {10, 30, 40}),
        ([10, 20, 30, 40], 20, {"last": 2}, {10, 20}),  # 30 and 40 were skipped as damaged
        ([10, 20, 30, 40], 20, {"last": 1, "every": 10, "best": 30}, {10, 20}),
        ([40, 10, 30, 20], 40, {"last": 2}, {30, 40}),
        ([0, 10], 10, {"last": 1, "every": 10}, {0, 10}),
    ],
)
def test_which_stay(steps, newest, rules, stay):
    assert kept(steps, newest, **rules) == stay


def test_the_best_is_the_latest_of_the_highest():
    scores = {10: 0.2, 20: 0.5, 30: None, 40: 0.5, 50: 0.4}
    assert best_of(scores, scores.get) == 40
    assert best_of([30], scores.get) is None
    assert best_of([], scores.get) is None


def test_steps_are_numbers_and_not_words(tmp_path):
    for step in (999999, 1000000, 5):
        write(tmp_path, step)
    assert [folder.name for folder in folders_of(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]
    assert newest_whole(tmp_path).name == "step-1000000"


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    write(tmp_path, 3)
    mine = [tmp_path / "step-000003.mine", tmp_path / "step-last", tmp_path / "notes"]
    for folder in mine:
        folder.mkdir()
    (tmp_path / "step-000009").write_text("a file")
    (tmp_path / "step-000004.tmp").mkdir()
    assert [folder.name for folder in folders_of(tmp_path)] == ["step-000003"]
    clear_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "step-000003", tmp_path / "step-000009", *mine])


def test_what_cannot_be_looked_at_is_not_taken_for_empty(tmp_path, monkeypatch):
    """A disk that is not mounted yet: a run that began anew there would later remove what it had learnt."""
    checkpoints = tmp_path / "checkpoints"
    assert folders_of(checkpoints) == []
    checkpoints.symlink_to(tmp_path / "scratch")
    with pytest.raises(InputError, match="checkpoints: is a link to nothing; is a disk not mounted"):
        newest_whole(checkpoints)
    write(tmp_path / "scratch", 7)
    assert newest_whole(checkpoints).name == "step-000007"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be looked at \(Not a directory\)"):
        folders_of(tmp_path / "file")

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checkpoint_folder.os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be looked at \(Permission denied\)"):
        complete_checkpoint(tmp_path)


def test_shares_of_the_checksums_cover_every_file_once(tmp_path):
    folder = write(tmp_path, 1)
    for name in NEEDED:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b"~")
        found = [damage(folder, share, 3) for share in range(3)]
        assert [each for each in found if each is not None] == [f"{name} does not match its checksum"]
        (folder / name).write_bytes(content)


def test_reading_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "CHUNK_BYTES", 1000)
    folder = write(tmp_path, 1, "x" * 10_000)
    signs = []
    assert damage(folder, stir=lambda: signs.append(1)) is None
    assert len(signs) > 10 * len(NEEDED)


def test_an_unfinished_one_that_cannot_be_removed_hinders_no_other(tmp_path, monkeypatch):
    """As where another program holds one of its files open on a network file system."""
    left = tmp_path / "step-000001.old.tmp"
    (left / "dcp").mkdir(parents=True)
    (tmp_path / "step-000002.tmp").mkdir()

    def refuse(path, plain=checkpoint_folder.shutil.rmtree):
        if path.name in ("step-000001.old.tmp", "step-000003.tmp"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        plain(path)

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", refuse)
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.old.tmp"]
    write(tmp_path, 2)
    assert newest_whole(tmp_path).name == "step-000002"
    (tmp_path / "step-000003.tmp").mkdir()
    with pytest.raises(OSError, match="not empty"):
        create(tmp_path / "step-000003.tmp")
    monkeypatch.undo()
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_files_that_nothing_reads_do_no_harm(tmp_path):
    folder = write(tmp_path, 1)
    (folder / ".nfs0001").write_bytes(b"x")
    (folder / TENSORS / "__9_9.distcp").write_bytes(b"x")
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("", "manifest.json cannot be read"),
        ("[]", "it is no table of files"),
        ("{}", "does not name state.json"),
        ('{"state.json": 3}', "'state.json' has no size and checksum"),
        ('{"../../secret": {"bytes": 1, "sha256": ""}}', "'../../secret' does not lie in the checkpoint"),
        ('{"/etc/passwd": {"bytes": 1, "sha256": ""}}', "'/etc/passwd' does not lie in the checkpoint"),
        ("\udcff", "manifest.json cannot be read"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, manifest, said):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))
    assert said in damage(folder)


def test_no_flipped_bit_of_a_manifest_passes(tmp_path):
    """Two of each byte."""
    folder = write(tmp_path, 1)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for at in range(len(content)):
        for bit in (at % 8, (at + 3) % 8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            manifest.write_bytes(flipped)
            # Nothing but white space may differ.
            assert damage(folder) is not None or flipped.split() == content.split(), (at, bit)
    manifest.write_bytes(content)
    assert damage(folder) is None


def test_a_folder_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    assert newest_whole(tmp_path) is None
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_text("other")
    said = []
    with pytest.raises(InputError) as caught:
        newest_whole(tmp_path, said.append)
    for text in (str(caught.value), "\n".join(said)):
        assert "step-000001" in text
        assert "step-000002" in text
    assert "move this folder away or name another run to begin at step 0" in str(caught.value)


def test_a_step_that_is_asked_for(tmp_path):
    (write(tmp_path / "checkpoints", 1) / "state.json").write_text("other")
    write(tmp_path / "checkpoints", 2)
    assert complete_checkpoint(tmp_path).name == complete_checkpoint(tmp_path, 2).name == "step-000002"
    with pytest.raises(InputError, match=r"step-000001: not whole \(state.json has 5 bytes"):
        complete_checkpoint(tmp_path, 1)


def test_a_checkpoint_goes_by_a_rename(tmp_path, monkeypatch):
    """What a kill in the middle of a removal leaves has a name that is never read."""
    folder = write(tmp_path, 1)
    seen = []

    def cut(path):
        seen.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert seen == ["step-000001.old.tmp"]
    assert folders_of(tmp_path) == []
    monkeypatch.undo()
    clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_not_what_it_names(tmp_path):
    there = write(tmp_path / "elsewhere", 1)
    (tmp_path / "step-000001").symlink_to(there)
    assert damage(tmp_path / "step-000001") is None
    discard(tmp_path / "step-000001")
    assert damage(there) is None
    assert not os.path.lexists(tmp_path / "step-000001")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_files_that_this_machine_does_not_see(tmp_path):
    """The ranks of two machines whose run folders are not the same."""
    beside = tmp_path / "step-000001.tmp"
    create(beside)
    files = {}
    for name in NEEDED:
        (beside / name).write_text(name)
        files |= describe(beside, [beside / name])
    files["dcp/__1_0.distcp"] = {"bytes": 5, "sha256": "0"}
    with pytest.raises(OSError, match="all ranks need the same file system"):
        publish(beside, tmp_path / "step-000001", files)
    assert folders_of(tmp_path) == []
