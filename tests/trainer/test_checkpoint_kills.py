"""A save that is killed before any of its operations on the file system leaves a whole checkpoint and hinders no later save.

What it proves: of checkpoints 1 and 2 and a save of 3 that keeps one, resuming finds 2 until 3 stands and 3 from then on, bit for
bit and without a word of damage; the next save leaves its own checkpoint alone in the folder. What it does not: that a power cut
keeps what was flushed (fsync's promise), nor kills of several ranks (tests/e2e).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_kills
import pytest


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """(before which operation each kill came; what was found after it; exit code and words of a save whose disk hangs)."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, checkpoint_kills.__file__, str(tmp_path_factory.mktemp("kills"))]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    [hung] = [line["hung"] for line in lines if "hung" in line]
    before = [line["before"] for line in lines if "before" in line]
    return before, [line for line in lines if "k" in line], (hung, done.stderr)


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(kills):
    _, found, _ = kills
    for each in found:
        assert each["whole"], each
        assert each["resumed"] in (2, 3), each
        assert each["said"] == [], each
        assert each["then"] == ["step-000004"], each
    assert [each["resumed"] for each in found] == sorted(each["resumed"] for each in found), "once it stands, it stands"


def test_the_kills_came_everywhere(kills):
    """Before the folder, between files, before the manifest, before and after the rename, and while old ones are removed."""
    before, found, _ = kills
    assert len(before) == len(found) - 1 > 40
    assert found[-1]["through"]
    for operation in (
        "os.mkdir step-000003.tmp", "open __0_0.distcp", "os.rename .metadata.tmp", "open state.json", "open manifest.json",
        "os.rename step-000003.tmp", "os.rename step-000001", "os.remove manifest.json", "fsync",
    ):  # fmt: skip
        assert operation in before, operation
    left = [set(each["left"]) for each in found]
    assert {"step-000001", "step-000002", "step-000003.tmp"} in left
    assert {"step-000001", "step-000002", "step-000003"} in left
    assert {"step-000001.old.tmp", "step-000002", "step-000003"} in left
    assert left[-1] == {"step-000003"}


def test_all_of_it_is_on_the_disk_before_the_name(kills):
    """Two files of tensors, two of state, the manifest, both folders; then the folder that has the name."""
    before, _, _ = kills
    renamed = before.index("os.rename step-000003.tmp")
    assert before[:renamed].count("fsync") == 7
    for file in ("open __0_0.distcp", "open .metadata.tmp"):
        assert before[before.index(file) + 1] == "fsync"
    assert before[renamed + 1 : renamed + 3] == ["open checkpoints", "fsync"]


def test_a_disk_that_hangs_ends_the_run(kills):
    """checkpoint.seconds: the process says where it hangs, and ends with exit code 3."""
    _, _, (code, said) = kills
    assert code == 3
    assert "rank 0: checkpoint of step 1: writing shards: " in said
