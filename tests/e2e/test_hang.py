"""What hangs is named, in one report, and nothing is left: whole runs in which a rank is stopped, or stops itself, for good."""

import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from tiny_run import ROOT, write_config

from tests.e2e.faulty_run import HANG_SECONDS
from trainer.hang_report import Health
from trainer.report_writer import health_path


def faulty(fault, config, ranks):
    """A run under torchrun, or alone for ranks 1, on which `fault` comes (tests/e2e/faulty_run.py)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "tests.e2e.faulty_run", fault, str(config)],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def report_of(run):
    (path,) = (run / "health").glob("report-*.txt")
    return path, path.read_text(encoding="utf-8")


def left(run):
    """Processes that have the run's configuration on their command line, or were started by one that had."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(run.with_suffix(".yaml")) in (process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a process's state is read from /proc")
@pytest.mark.parametrize(
    ("fault", "seconds", "matter"),
    [
        ("update:freeze", 5, r"frozen \(state T\)"),
        ("update:native", 12, r"alive, and no Python thread of it had a turn for \d+ s \(native code holds the interpreter\)"),
    ],
)
def test_a_rank_that_hangs_in_an_update_is_named_by_the_other(tiny, tmp_path, fault, seconds, matter):
    run = tmp_path / "run"
    ended = faulty(fault, write_config(tiny, run, ("seed: 3", f"seed: 3\nparallel: {{timeout_seconds: {seconds}}}")), 2)
    assert ended.returncode != 0
    assert "exitcode  : 3" in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("keju: error: ")]
    path, text = report_of(run)
    assert line == f"keju: error: {text.splitlines()[0]}; report: {path}"
    assert re.match(
        rf"rank 1 \(\S+, pid \d+\): in '\w+', step \d, .*sequence \d+, .*silent for \d+ s: {matter}$", text.splitlines()[0]
    )
    assert f"has not got on for {seconds} s (parallel.timeout_seconds)" in text
    rank_0, rank_1 = text.partition("Stack of rank 0")[2].split("Stack of rank 1")
    assert "in update" in rank_0
    assert "torch/distributed" in rank_0, "where the others wait"
    assert "faulty_run.py" in rank_1 or "no stack came (frozen (state T))" in rank_1
    assert left(run) == []
    assert (run / "checkpoints/step-000002/manifest.json").exists()


def test_an_embedded_engine_that_falls_silent_ends_the_run(tiny, tmp_path):
    run = tmp_path / "run"
    ended = faulty("generate:sleep", write_config(tiny, run, ("model: {", "engine: {silence_seconds: 3}\nmodel: {")), 1)
    assert ended.returncode == 3, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("keju: error: ")]
    assert "the embedded engine's generate of 6 outputs: token 1: nothing for 3 s; report: " in line
    assert "in sleep" in report_of(run)[1]


def test_a_rank_that_fails_among_others_is_gone_once_it_has_said_why(tiny, tmp_path):
    """Over NCCL the interpreter's end may wait for the others without end; here something else does."""
    run = tmp_path / "run"
    begun = time.monotonic()
    ended = faulty("update:fail", write_config(tiny, run), 2)
    assert time.monotonic() - begun < HANG_SECONDS / 4
    assert ended.returncode == 1
    assert "ValueError: of rank 1 alone, with a collective under way" in ended.stderr
    health = Health.from_json(health_path(run, 1).read_text(encoding="utf-8"))
    assert (health.end, health.code, health.why) == ("ended: ValueError", 1, "")
    assert not list((run / "health").glob("report-*")), "nothing hung"
    assert left(run) == []
