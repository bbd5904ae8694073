"""How a rank leaves its process group, and what torchrun's restarts may do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rollout import process
from rollout.errors import RunStopped
from trainer import distributed, launch, train
from trainer.config import RunConfig
from trainer.hang_report import Health
from trainer.report_writer import health_path


@pytest.mark.parametrize(
    ("cuda", "fails", "destroyed"), [(True, False, True), (True, True, False), (False, True, True), (False, False, True)]
)
def test_a_rank_that_fails_waits_for_nobody_over_nccl(monkeypatch, cuda, fails, destroyed):
    """Its error would be told only after parallel.timeout_seconds, and as a hang."""
    calls = []

    class Mesh:
        mesh_dim_names = ()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_, **__: Mesh())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        with distributed.process_group(1.0):
            if fails:
                raise ValueError("of this rank alone")
    except ValueError:
        assert fails
    assert calls == ["nccl" if cuda else "gloo", *(["destroyed"] if destroyed else [])]


@pytest.fixture
def restarted(monkeypatch):
    """This process as a rank that torchrun starts: (restart, of how many) → that."""
    monkeypatch.setenv("RANK", "0")

    def start(count, most):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))

    return start


WHY = "steps 2 to 3 each had a mini-batch that could not be trained on"


def ended(folder, *ends, launched=None):
    """launched: by what; by this process's torchrun."""
    (folder / "health").mkdir(parents=True, exist_ok=True)
    for rank, end in enumerate(ends):
        health = Health(
            rank, "here", 1, 1, launches=[launch.launch_name()] if launched is None else launched,
            end=end, code=2 if end == "ended: InputError" else 1 if "ValueError" in end else 3, why=WHY,
        )  # fmt: skip
        health_path(folder, rank).write_text(health.to_json())


def configuration(run):
    data = {"train": {"path": "x"}, "max_prompt_tokens": 32}
    stages = [{"name": "one", "steps": 1, "context": 96, "data": data}]
    return RunConfig.model_validate({"run": run, "model": {"path": "m"}, "stages": stages})


@pytest.mark.parametrize("end", ["ended: RunStopped", "ended: InputError"])
def test_torchrun_does_not_start_again_what_stopped_of_its_own(tmp_path, restarted, monkeypatch, end):
    run = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    restarted(1, 2)
    ended(run, "ended: SystemExit", end)
    before = {path: path.read_text() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:  # torchrun will try once more: without a word
        train.run_rank(configuration(run))
    assert caught.value.code == (2 if "Input" in end else 3)
    restarted(2, 2)
    with pytest.raises(RunStopped, match=f"run: not started again, as it stopped of its own: {WHY}; mend that"):
        train.run_rank(configuration(run))
    assert {path: path.read_text() for path in run.rglob("*") if path.is_file()} == before, "the next restart is refused as well"
    monkeypatch.setenv("LOCAL_RANK", "1")
    slept = []
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        launch.refuse_restart(run)
    assert slept == [launch.SAY_SECONDS], "it does not end before the other has said so"


@pytest.mark.parametrize(
    ("ends", "launched"),
    [
        (("",), None),
        (("ended",), None),
        (("ended: EngineError",), None),
        (("ended: ValueError",), None),
        (("", "ended: RunStopped"), None),  # on more ranks than now
        (("ended: RunStopped",), []),
        (("ended: RunStopped",), ["here, pid 7, born 9"]),  # what a person started again, and then died before it said anything
    ],
)
def test_torchrun_starts_again_what_died_or_was_lost(tmp_path, restarted, ends, launched):
    restarted(2, 2)
    ended(tmp_path, *ends, launched=launched)
    launch.refuse_restart(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"torn": 1}', "[]", "3"])
def test_a_record_that_cannot_be_read_keeps_nothing_from_starting(tmp_path, restarted, text):
    restarted(1, 1)
    ended(tmp_path, "")
    health_path(tmp_path, 0).write_text(text)
    launch.refuse_restart(tmp_path)


def test_a_persons_start_is_never_refused(tmp_path, restarted):
    restarted(0, 2)
    ended(tmp_path, "ended: RunStopped", launched=["here, pid 7, born 9"])
    assert launch.first_start(tmp_path)
    launch.refuse_restart(tmp_path)


def test_a_start_because_another_host_came_is_no_first_one(tmp_path, restarted):
    """torchrun does not count it."""
    restarted(0, 2)
    ended(tmp_path, "", "ended: RunStopped")
    assert not launch.first_start(tmp_path)
    ended(tmp_path, "ended: RunStopped")
    with pytest.raises(SystemExit):
        launch.refuse_restart(tmp_path)


def test_the_name_of_a_launch_is_that_of_one_process(restarted):
    name = launch.launch_name()
    assert f"pid {os.getppid()}, born {process.birth(os.getppid())}" in name


def test_the_torchruns_of_all_hosts_know_each_others_ends(tmp_path, restarted, monkeypatch):
    """Rank 0 of the other host met bad input; this one's would wait for it half an hour."""
    restarted(1, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended(tmp_path, "ended: InputError", "ended: RuntimeError", launched=["other, pid 7, born 9", launch.launch_name()])
    assert not launch.first_start(tmp_path)
    with pytest.raises(RunStopped, match="not started again"):
        launch.refuse_restart(tmp_path)


def test_without_torchrun_a_launch_has_no_name(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.launch_name() == ""


FAILING = """
import atexit, os, sys, time
from rollout import process
from rollout.errors import RunStopped
from trainer import launch
atexit.register(print, "taken down")
def main(arguments):
    print("said", end="")
    raise {"stopped": RunStopped, "defect": ValueError}[sys.argv[1]]("why") if sys.argv[1] != "well" else SystemExit(0)
launch.run(main)
"""


@pytest.mark.parametrize(
    ("size", "how", "code", "taken_down"),
    [(2, "stopped", 3, False), (2, "defect", 1, False), (2, "well", 0, True), (1, "stopped", 3, True), (1, "defect", 1, True)],
)
def test_a_rank_that_fails_among_others_says_why_and_is_gone(size, how, code, taken_down):
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": str(size)}
    result = subprocess.run(
        [sys.executable, "-c", FAILING, how], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == code
    assert result.stdout == ("saidtaken down\n" if taken_down else "said")
    assert result.stderr.splitlines()[-1:] == {"stopped": ["keju: error: why"], "defect": ["ValueError: why"], "well": []}[how]
