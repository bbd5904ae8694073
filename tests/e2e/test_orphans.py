"""Whatever of a run on two ranks is killed, nothing of it is left within seconds, and the same command goes on; with --restarts
it goes on by itself."""

import json
import os
import shutil
import signal
import sys
import time

import psutil
import pytest
from tiny_run import command, write_config

from trainer.metrics import comparable, read_metrics

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a rank looks for its parent once a second"),
    pytest.mark.long,
]
MORE = ("    steps: 2\n    context: 48", "    steps: 300\n    context: 48")
"""Nobody waits for its end."""
GONE_SECONDS = 20


def wait_until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def steps_of(run):
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"kind": "train"') if path.exists() else 0


def start(config_path, run, *options):
    """A run that has done a step since its start: (the command, [torchrun, its ranks and their children])."""
    before = steps_of(run)
    process = command(config_path, "--ranks", "2", *options)
    wait_until(lambda: process.poll() is not None or steps_of(run) > before, "no step")
    assert process.poll() is None, process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def ranks_of(family):
    return [each for each in family if "TORCHELASTIC_RESTART_COUNT" in each.environ() and "trainer.train" in each.cmdline()]


def owner_of(run):
    return json.loads((run / "run.lock").read_text())["pid"]


def all_gone(family):
    _, alive = psutil.wait_procs(family, timeout=0)
    return not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_nothing_outlives_the_command_or_torchrun_or_rank_0_and_the_same_command_goes_on(tiny, tmp_path):
    run = tmp_path / "run"
    config_path = write_config(tiny, run, MORE)
    for victim in ("torchrun", "the command", "rank 0"):
        process, family = start(config_path, run)
        ranks = ranks_of(family)
        assert len(ranks) == 2
        assert len(family) >= 5, "torchrun, two ranks, and a verifier each"
        killed = {"torchrun": family[0].pid, "the command": process.pid, "rank 0": owner_of(run)}[victim]
        os.kill(killed, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        wait_until(lambda family=family: all_gone(family), f"left by {victim}", GONE_SECONDS)
        if victim == "rank 0":
            assert process.returncode == 3
            assert f"pid {killed}): " in errors
            assert "its process is gone; report: " in errors
    # Also the second signal: at once.
    process, family = start(config_path, run)
    assert steps_of(run) >= 4, "each start went on where the one before was"
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None or (run / "stop").exists(), "the request did not reach the ranks", 20)
    process.send_signal(signal.SIGTERM)  # two at once would be one
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    wait_until(lambda: all_gone(family), "left by the second signal", GONE_SECONDS)
    assert f"taken over from process {killed} on " in errors, "the lock tells who was killed"


@pytest.fixture(scope="module")
def unkilled(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("restarts") / "whole"
    process = command(write_config(tiny, run), "--ranks", "2")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    return run


def test_with_restarts_a_killed_rank_costs_nothing(tiny, unkilled, tmp_path):
    run = tmp_path / "run"
    config_path = write_config(tiny, run)
    shutil.copytree(unkilled, run, ignore=shutil.ignore_patterns("health", "run.lock"))
    for folder in (run / "checkpoints").iterdir():
        if folder.name > "step-000002":
            shutil.rmtree(folder)
    process = command(config_path, "--ranks", "2", "--restarts", "1")
    wait_until(lambda: process.poll() is not None or (run / "checkpoints/step-000003").exists(), "no checkpoint")
    assert process.poll() is None, process.communicate()
    (first,) = [each for each in ranks_of(psutil.Process(process.pid).children(recursive=True)) if each.pid == owner_of(run)]
    (other,) = [each for each in ranks_of(psutil.Process(process.pid).children(recursive=True)) if each.pid != first.pid]
    other.kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert output.count("continuing after step") == 2
    assert [comparable(row) for row in read_metrics(run)] == [comparable(row) for row in read_metrics(unkilled)]
