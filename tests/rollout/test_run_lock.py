"""One writer a run folder, and what of a dead or frozen one remains: with real processes that hold it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rollout import process
from rollout.errors import InputError
from rollout.run_lock import RunLock

HOLD = "import sys; from pathlib import Path; from rollout.run_lock import RunLock; import rollout.run_lock\n"
HOLD += "rollout.run_lock.BEAT_SECONDS = 0.05\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run until its stdin ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def set_owner(run, age: float, **changes) -> None:
    path = run / "run.lock"
    path.write_text(json.dumps({"pid": 77, "host": "elsewhere", "started": "2026-01-02 03:04:05 UTC", "job": ""} | changes))
    os.utime(path, (time.time() - age,) * 2)


def refusal(run) -> str:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in [run, *run.iterdir()])
    with pytest.raises(InputError) as refused:
        RunLock(run)
    with pytest.raises(InputError, match=r"run: (in use|held) by"):
        RunLock.check(run)
    after = sorted((path.name, path.stat().st_mtime_ns) for path in [run, *run.iterdir()])
    assert after == before, "a refusal touches nothing"
    return str(refused.value)


def test_a_living_owner_is_named_with_the_time_it_began(tmp_path, holder):
    text = refusal(tmp_path / "run")
    assert text.startswith(
        f"{tmp_path}/run: run: in use by a living run (process {holder.pid} on {socket.gethostname()}, started 20"
    )
    assert "frozen" not in text


def test_it_keeps_beating_while_it_lives(tmp_path, holder):
    path = tmp_path / "run/run.lock"
    first = path.stat().st_mtime_ns
    end = time.monotonic() + 10
    while path.stat().st_mtime_ns == first:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the state")
def test_a_frozen_owner_is_refused_as_frozen_with_what_to_do(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(holder.pid, os.WUNTRACED)[1])
    os.utime(tmp_path / "run/run.lock", (time.time() - 300,) * 2)
    text = refusal(tmp_path / "run")
    assert f"held by process {holder.pid} on " in text
    assert "which seems to be frozen (state T): no sign of life for 300 s" in text
    assert f"kill -CONT {holder.pid}" in text
    holder.send_signal(signal.SIGCONT)


def test_what_a_killed_owner_left_is_taken_over_and_said(tmp_path, holder, capsys):
    holder.kill()
    holder.wait()
    RunLock.check(tmp_path / "run")
    assert capsys.readouterr().err == "", "only whoever takes it says so"
    with RunLock(tmp_path / "run"):
        said = capsys.readouterr().err
        assert json.loads((tmp_path / "run/run.lock").read_text())["pid"] == os.getpid()
    assert said.startswith(f"keju: {tmp_path}/run: taken over from process {holder.pid} on ")
    assert "last sign of life was 0 s ago" in said
    assert said.count("\n") == 1


def test_what_was_released_is_taken_without_a_word(tmp_path, holder, capsys):
    holder.communicate("")
    RunLock(tmp_path / "run").release()
    assert "taken over" in capsys.readouterr().err, "the process ended without releasing it"
    lock = RunLock(tmp_path / "run")
    lock.release()
    lock.release()
    RunLock(tmp_path / "run").release()
    assert capsys.readouterr().err == ""


def test_another_hosts_fresh_heartbeat_is_respected_and_a_stale_one_is_not(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    set_owner(run, age=20)
    text = refusal(run)
    assert "in use by a living run (process 77 on elsewhere, started 2026-01-02 03:04:05 UTC, last sign of life 20 s ago)" in text
    set_owner(run, age=70)
    RunLock(run).release()
    assert "taken over from process 77 on elsewhere" in capsys.readouterr().err
    set_owner(run, age=20, released="2026-01-02 03:04:06 UTC")
    RunLock(run).release()
    assert capsys.readouterr().err == ""


def test_two_hosts_of_one_name_are_two(tmp_path):
    """As machines from one image are."""
    run = tmp_path / "run"
    run.mkdir()
    set_owner(run, age=20, host=socket.gethostname(), boot="of the other one")
    assert "in use by a living run (process 77 on " in refusal(run)
    set_owner(run, age=20, host=socket.gethostname(), boot=process.boot())
    RunLock(run).release()


def test_an_owner_that_wakes_and_finds_another_in_its_place_ends_and_touches_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(holder.pid, os.WUNTRACED)[1])
    set_owner(tmp_path / "run", age=0)
    before = (tmp_path / "run/run.lock").read_text(), (tmp_path / "run/run.lock").stat().st_mtime_ns
    holder.send_signal(signal.SIGCONT)
    assert holder.wait(30) == 3
    errors = holder.stderr.read()
    line = f"keju: error: {tmp_path}/run: taken over by process 77 on elsewhere, started 2026-01-02 03:04:05 UTC while this"
    assert errors.startswith(line)
    assert ((tmp_path / "run/run.lock").read_text(), (tmp_path / "run/run.lock").stat().st_mtime_ns) == before


def test_a_release_leaves_the_successors_lock_alone(tmp_path):
    lock = RunLock(tmp_path / "run")
    set_owner(tmp_path / "run", age=0)
    before = (tmp_path / "run/run.lock").read_text()
    lock.release()
    assert (tmp_path / "run/run.lock").read_text() == before


@pytest.fixture
def small_disk(mounted):
    """A file system of 64 KiB."""
    return mounted("64k")


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def test_a_disk_that_takes_no_lock_is_one_line_and_one_that_is_full_at_the_end_none(small_disk):
    lock = RunLock(small_disk)
    lock._file.truncate(0)  # so that its page is free, and taken by what comes
    fill(small_disk)
    lock.release()
    with pytest.raises(InputError, match=r"small-0: run: cannot be written \(No space left on device\); free space there"):
        RunLock(small_disk)
    (small_disk / "filler").unlink()
    RunLock(small_disk).release()


def test_a_job_that_torchrun_restarts_elsewhere_takes_its_own_lock(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    set_owner(run, age=1, job="job-6")
    assert "in use" in refusal(run)
    set_owner(run, age=1, job="job-7")
    RunLock(run).release()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says where nobody named the job
    set_owner(run, age=1, job="none")
    assert "in use" in refusal(run)


@pytest.mark.parametrize("offset", [-1e6, 1e6], ids=["behind", "ahead"])
def test_no_hosts_clock_matters(tmp_path, holder, monkeypatch, offset):
    plain = time.time
    monkeypatch.setattr(time, "time", lambda: plain() + offset)
    assert "in use by a living run" in refusal(tmp_path / "run")


def test_a_lock_file_that_is_no_json_is_an_unknown_owners(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.lock").write_text("[1")
    RunLock(run).release()
    assert capsys.readouterr().err == "", "nobody is known to have had it"
