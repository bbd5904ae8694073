"""How a rank leaves its process group, and what torchrun's restarts may do."""

import json

import pytest
import torch
import torch.distributed as dist

from rollout.errors import RunStopped
from trainer import distributed, launch, train
from trainer.config import RunConfig
from trainer.hang_report import Health


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


def ended(folder, *ends):
    (folder / "health").mkdir(parents=True, exist_ok=True)
    for rank, end in enumerate(ends):
        (folder / "health" / f"rank-{rank:05}.json").write_text(Health(rank, "here", 1, 1, end=end, code=3).to_json())


@pytest.mark.parametrize("end", ["ended: RunStopped", "ended: InputError"])
def test_torchrun_does_not_start_again_what_stopped_of_its_own(tmp_path, monkeypatch, end):
    run = tmp_path / "run"
    ended(run, end, "ended: SystemExit")
    data = {"train": {"path": "x"}, "max_prompt_tokens": 32}
    stages = [{"name": "one", "steps": 1, "context": 96, "data": data}]
    config = RunConfig.model_validate({"run": run, "model": {"path": "m"}, "stages": stages})
    before = {path: path.read_text() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RunStopped, match=r"run: not started again: it stopped of its own, for what rank 0 said above"):
        train.run_rank(config)
    assert {path: path.read_text() for path in run.rglob("*") if path.is_file()} == before, "the next restart is refused as well"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    launch.refuse_restart(run)  # a person's
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended(run, "", "", end)  # of an earlier launch, on more ranks
    launch.refuse_restart(run)


@pytest.mark.parametrize("end", ["", "ended", "ended: EngineError", "ended: ValueError"])
def test_torchrun_starts_again_what_died_or_was_lost(tmp_path, monkeypatch, end):
    ended(tmp_path, end)
    (tmp_path / "health" / "rank-00001.json").write_text(json.dumps({"torn": 1}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    launch.refuse_restart(tmp_path)
