"""The watch in processes of its own, which it ends: alone, and as two ranks that meet in a store, without a model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

ALONE = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from rollout.deadline import Deadline
from trainer.watch import Watch

def watch(**options):
    options = {"seconds": 60.0, "stop_seconds": 60.0} | options
    return Watch(Path(sys.argv[1]), 0, 1, **options)

def ready():
    print("ready", flush=True)

def until(true):
    while not true():
        time.sleep(0.01)
"""
RANKS = """
import os, signal, sys, time
from pathlib import Path
from trainer.distributed import process_group
from trainer.watch import Watch

RANK = int(os.environ["RANK"])
ended = Path(sys.argv[1]) / f"ended-{RANK}"
options = {"seconds": float(sys.argv[2]), "stop_seconds": 60.0, "launch": f"torchrun {RANK}"}
with Watch(Path(sys.argv[1]), RANK, 2, **options) as watch:
    with process_group(float(sys.argv[2]), watch=watch) as (ranks, mesh, device):
        ranks.broadcast(None)
        pid = os.getpid()
"""


def start(program: str, run: Path, *arguments: object, preexec_fn=None, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, run, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn,
    )  # fmt: skip


def alone(program: str, run: Path, preexec_fn=None) -> subprocess.Popen:
    process = start(ALONE + program, run, preexec_fn=preexec_fn)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def two(program: str, run: Path, seconds: float = 60.0, ranks: Iterable[int] = range(2)) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = RANKS + "\n".join(f"        {line}" for line in program.strip().splitlines())
    return [start(program, run, seconds, RANK=str(rank), **place) for rank in ranks]


def ends(process: subprocess.Popen, seconds: float = 60.0) -> tuple[int, str]:
    """(exit code, what it said on stderr)."""
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def report_of(run: Path) -> str:
    (path,) = (run / "health").glob("report-*.txt")
    return path.read_text()


def test_a_pulse_that_stands_still_ends_the_process_with_a_report(tmp_path):
    process = alone(
        "with watch(seconds=0.4) as w:\n  w.main.step = 3\n  ready()\n  def hangs(): time.sleep(60)\n  hangs()", tmp_path
    )
    code, errors = ends(process)
    assert code == 3
    (line,) = errors.splitlines()
    assert re.fullmatch(
        r"keju: error: rank 0 \(\S+, pid \d+\): in 'start', step 3, sequence 0, silent for \d s: .*; report: .*", line
    )
    text = report_of(tmp_path)
    assert line.partition("; report: ")[2] == str(next((tmp_path / "health").glob("report-*.txt")))
    assert text.startswith(f"rank 0 ({socket.gethostname()}, pid {process.pid}): ")
    assert "has not got on for 0.4 s (parallel.timeout_seconds)" in text
    assert "in hangs" in text


def test_a_beat_in_time_is_enough(tmp_path):
    process = alone(
        "with watch(seconds=0.8) as w:\n  ready()\n  for n in range(20):\n    time.sleep(0.1)\n    w.main.beat()\nprint('done')",
        tmp_path,
    )
    assert ends(process) == (0, "")
    health = json.loads((tmp_path / "health/rank-00000.json").read_text())
    assert (health["sequence"], health["end"], health["pid"]) == (20, "ended", process.pid)
    assert not list((tmp_path / "health").glob("report-*"))


def test_a_deadline_that_is_missed_is_the_report_s_reason(tmp_path):
    process = alone(
        "with watch(), Deadline(0.3, 'push of version 7') as push:\n  push.at('gathering a')\n  ready()\n  time.sleep(60)",
        tmp_path,
    )
    code, errors = ends(process)
    assert code == 3
    assert errors.startswith("keju: error: push of version 7: gathering a: nothing for 0.3 s; report: ")
    assert errors.count("\n") == 1
    assert "push of version 7: gathering a" in report_of(tmp_path).splitlines()[5], "in the table, too"


def test_the_thread_that_samples_ahead_has_a_clock_of_its_own_only_while_it_waits(tmp_path):
    program = "with watch(seconds=0.5) as w:\n  ready()\n  def beats(): time.sleep(0.05); w.main.beat()\n"
    idle = alone(program + "  for n in range(25): beats()", tmp_path / "idle")
    hung = alone(program + "  with w.ahead.waiting('gather'):\n    while True: beats()", tmp_path / "hung")
    assert ends(idle)[0] == 0
    assert ends(hung)[0] == 3
    assert "waits for 0.5 s (parallel.timeout_seconds) for others to sample ahead" in report_of(tmp_path / "hung")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends(tmp_path, number):
    process = alone(
        "with watch() as w:\n  ready()\n  until(w.stopping)\n  print('asked')\n  ctypes.CDLL(None).sleep(60); time.sleep(60)",
        tmp_path,
    )
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(number)
    assert ends(process, 20)[0] == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_caller_ignores_asks_for_nothing(tmp_path, number):
    """As under nohup, when the connection is gone."""
    process = alone(
        "with watch() as w:\n  ready()\n  until((Path(sys.argv[1]) / 'sent').exists)\n  time.sleep(1.0)\n"
        "  print(w.stopping())\n  until(w.stopping)\n  print('asked')",
        tmp_path,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    process.send_signal(number)
    process.send_signal(number)
    (tmp_path / "sent").touch()
    assert process.stdout.readline() == "False\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    assert ends(process)[0] == 0


def test_a_signal_is_heard_while_the_main_thread_sits_in_a_c_call(tmp_path):
    """The interpreter would run a handler only when the call returns."""
    process = alone(
        "with watch() as w:\n  def ask(): until(w.stopping); print('asked')\n"
        "  threading.Thread(target=ask, daemon=True).start()\n  ready()\n"
        "  lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\n  lock(mutex)\n  lock(mutex)",
        tmp_path,
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.kill()
    process.communicate()


def test_the_stop_file_asks_and_one_from_before_the_start_does_not(tmp_path):
    (tmp_path / "stop").touch()
    process = alone("with watch(clear=True) as w:\n  ready()\n  until(w.stopping)\n  print('asked')", tmp_path)
    assert not (tmp_path / "stop").exists()
    (tmp_path / "stop").touch()
    assert process.stdout.readline() == "asked\n"
    assert ends(process)[0] == 0
    assert not (tmp_path / "stop").exists(), "obeyed"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        ("EngineError('why')", True),
        ("ValueError('why')", True),
        ("RunStopped('why')", False),
        ("InputError('why')", False),
        ("OSError(28, 'full', 'x')", False),  # which ends as bad input does, and is not started again
    ],
)
def test_a_stop_that_was_not_carried_out_is_still_asked_for(tmp_path, error, kept):
    """torchrun may start again what failed in the meantime, and nobody would ask a second time."""
    process = alone(
        "from rollout.errors import *\nwith watch() as w:\n  ready()\n  until(w.stopping)\n  raise " + error, tmp_path
    )
    (tmp_path / "stop").touch()
    assert ends(process)[0] == 1
    assert (tmp_path / "stop").exists() is kept


def test_a_stop_that_takes_too_long_ends_with_a_report(tmp_path):
    process = alone("with watch(stop_seconds=0.5) as w:\n  ready()\n  time.sleep(60)", tmp_path)
    process.send_signal(signal.SIGTERM)
    code, errors = ends(process)
    assert code == 3
    said = "the run was asked to stop (SIGTERM at rank 0) and has not within 0.5 s (checkpoint.stop_seconds)"
    assert errors.startswith(f"keju: error: {said}; report: ")
    assert said in report_of(tmp_path)


def test_a_report_that_cannot_be_written_is_said_and_the_process_still_ends(tmp_path):
    process = alone(
        "with watch(seconds=0.5) as w:\n  import shutil\n  def gone():\n    shutil.rmtree(sys.argv[1], ignore_errors=True)\n"
        "    return not Path(sys.argv[1]).exists()\n  until(gone)\n  ready()\n  time.sleep(60)",  # it may just be written to
        tmp_path / "run",
    )
    code, errors = ends(process)
    assert code == 3
    assert "no report could be written (FileNotFoundError" in errors.splitlines()[0]
    assert "most recent call first" in errors, "the stacks go to stderr then"


def test_an_end_gives_everything_back(tmp_path):
    import faulthandler
    import threading

    from rollout import deadline
    from trainer.watch import Watch

    before = signal.getsignal(signal.SIGTERM), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with Watch(tmp_path, 0, 1, seconds=60.0, stop_seconds=60.0):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))) == before
    assert deadline._reporter is None
    assert not faulthandler.unregister(signal.SIGUSR1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_never_came_ends_at_the_first_signal(tmp_path, rank):
    """torchrun sends it when another rank has died, and would kill this one half a minute later."""
    (process,) = two("raise AssertionError", tmp_path, ranks=[rank])
    health = tmp_path / f"health/rank-{rank:05d}.json"
    end = time.monotonic() + 60
    while not health.exists() or process.poll() is not None:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert ends(process, 10) == (128 + signal.SIGTERM, "")


def test_a_frozen_rank_is_named_and_killed_and_the_other_ends(tmp_path):
    one, other = two(
        "if RANK == 1: os.kill(os.getpid(), signal.SIGSTOP)\nranks.gather(None)\ntime.sleep(60)", tmp_path, seconds=3.0
    )
    start = time.monotonic()
    code, errors = ends(one)
    assert code == 3
    assert ends(other)[0] == -signal.SIGKILL
    assert time.monotonic() - start < 40
    (line,) = [line for line in errors.splitlines() if line.startswith("keju: ")]
    assert f"keju: error: rank 1 ({socket.gethostname()}, pid {other.pid}): " in line
    assert re.search(r"behind the others by [12],", line), "a rank says once a second where it is"
    assert "frozen (state T)" in line
    text = report_of(tmp_path)
    assert "waits for" in text
    assert "gather_object" in text.partition("Stack of rank 0")[2]


def test_a_rank_that_dies_without_a_word_ends_the_other_at_once_with_a_report(tmp_path):
    one, other = two("if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", tmp_path)
    assert ends(other)[0] == -signal.SIGKILL
    code, errors = ends(one, 30)
    assert code == 3
    assert f"rank 1 ({socket.gethostname()}, pid {other.pid}): " in errors
    assert "its process is gone; report: " in errors


def test_a_collective_that_fails_because_the_other_died_is_no_traceback(tmp_path):
    one, other = two("if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)\nranks.gather(None)", tmp_path)
    assert ends(other)[0] == -signal.SIGKILL
    code, errors = ends(one, 30)
    assert code == 3
    assert "Traceback" not in errors
    assert "its process is gone; report: " in errors


def test_an_alarm_of_one_rank_ends_both_with_one_report(tmp_path):
    """Both are silent at the same time, so both would write it."""
    ranks = two("time.sleep(60)", tmp_path, seconds=2.0)
    ended = [ends(each) for each in ranks]
    assert [code for code, _ in ended] == [3, 3]
    lines = [line for _, errors in ended for line in errors.splitlines() if "keju: error: " in line]
    assert len(lines) == 1, lines
    text = report_of(tmp_path)
    for rank in range(2):
        assert "File" in text.partition(f"Stack of rank {rank}")[2].partition("Stack of rank")[0]


def test_a_signal_at_rank_1_reaches_rank_0(tmp_path):
    ranks = two("print('ready', flush=True)\nwhile not watch.stopping(): time.sleep(0.01)\nprint('asked', flush=True)\n"
                "ranks.broadcast(None)", tmp_path)  # fmt: skip
    for each in ranks:
        assert each.stdout.readline() == "ready\n"
    ranks[1].send_signal(signal.SIGTERM)
    for each in ranks:
        assert each.stdout.readline() == "asked\n"
        assert ends(each)[0] == 0


def test_ranks_that_have_met_name_each_others_launch(tmp_path):
    for process in two("time.sleep(2.5)", tmp_path):
        assert ends(process)[0] == 0
    for rank in range(2):
        health = json.loads((tmp_path / f"health/rank-{rank:05d}.json").read_text())
        assert health["launches"] == ["torchrun 0", "torchrun 1"]


def test_a_full_disk_is_an_end_of_its_own(tmp_path):
    process = alone("with watch() as w:\n  ready()\n  raise OSError(28, 'full', 'the/file')", tmp_path)
    assert ends(process)[0] == 1
    health = json.loads((tmp_path / "health/rank-00000.json").read_text())
    assert (health["code"], health["why"]) == (2, "the/file: full; free space there, or name another place")
