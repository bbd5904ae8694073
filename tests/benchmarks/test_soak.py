"""What the long runs' commands count as growth, as loss and as a difference; and their pictures and tables."""

import json
import os
import subprocess
import sys
import uuid

import pytest

from benchmarks.soak import kills
from benchmarks.soak.__main__ import kills_table, memory_table
from benchmarks.soak.kills import Kill, KillSeries, Outcome, consistent, last_train, lost_prompts, same_as
from benchmarks.soak.memory import Series, held_mib
from benchmarks.soak.plot import draw
from benchmarks.soak.processes import MARK, files_of_shared_memory, kind_of, new_mark, shared_memory, wait_until_gone
from trainer.checkpoint_folder import NEEDED, STATE, describe, publish
from trainer.hang_report import Health
from trainer.metrics import LEDGER_FATES
from trainer.report_writer import health_path


def series(steps=210, **changes):
    """A run of two processes that hold the same all the time."""
    made = Series(
        mib={"rank 0": [500.0] * steps, "verifier 0": [90.0] * steps},
        threads={"rank 0": [12] * steps, "verifier 0": [3] * steps},
        files={"rank 0": [30] * steps, "verifier 0": [9] * steps},
        processes=[4] * steps,
        work={"length/max": [24.0] * steps, "sampling/rounds": [1.0] * steps},
        shared=[2] * steps,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    made.least = changes.get("least", made.mib)
    made.held = changes.get("held", {"rank 0": made.mib["rank 0"]})
    return made


HOLDS = """
import mmap, os, sys
named = open("/dev/shm/%s-named", "w+b"); named.truncate(4096); held = mmap.mmap(named.fileno(), 4096); named.close()
gone = open("/dev/shm/%s-gone", "w+b"); os.unlink(gone.name)
print("ready", flush=True); sys.stdin.read(); os.unlink("/dev/shm/%s-named")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_shared_memory_is_that_of_the_processes_asked_about():
    name = f"keju-test-{uuid.uuid4().hex}"
    code = HOLDS.replace("%s", name)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        held = shared_memory([process.pid])
        assert shared_memory([os.getpid()]) & held == set()
        assert f"/dev/shm/{name}-named" in held & files_of_shared_memory()
        (gone,) = held - {f"/dev/shm/{name}-named"}
        assert gone.startswith(f"/dev/shm/{name}-gone (deleted) ")
        process.stdin.close()
    assert shared_memory([process.pid]) == set(), "a process that has ended holds nothing"
    assert f"/dev/shm/{name}-named" not in files_of_shared_memory()


def test_what_holds_the_same_has_no_fault():
    assert series().faults() == []
    assert series().growth() == {"rank 0": 0.0, "verifier 0": 0.0}
    assert series().counts()["files of rank 0"] == (30, 30, 30)


def test_growth_is_that_after_the_first_fifty_steps():
    warming = [100.0 + min(step, 50) for step in range(210)]
    assert series(mib={"rank 0": warming}).faults() == []
    leaking = [500.0 * (1 + 0.0002 * step) for step in range(210)]
    (fault,) = series(mib={"rank 0": leaking}).faults()
    assert fault == "rank 0 grew by 2.7%"
    other = lambda values: series(mib={"rank 0": [500.0] * 210, "torchrun": values})  # noqa: E731
    sawtooth = [500.0 + 20 * (step % 10) for step in range(210)]
    assert other(sawtooth).faults() == [], "what is given back is no growth"
    (fault,) = other([value + 0.1 * step for step, value in enumerate(sawtooth)]).faults()
    assert fault.startswith("torchrun grew by 2."), "a leak under it is"
    flat = {"held": {"rank 0": [None] * 9 + [480.0] * 201}}
    working = [500.0 if step % 10 == 0 else 700.0 + step for step in range(210)]
    assert series(mib={"rank 0": working}, **flat).growth() == {"rank 0": 0.0}, "what steps need for themselves is no growth"
    assert series(mib={"rank 0": working}, **flat).median_growth()["rank 0"] == pytest.approx(897 / 763 - 1, abs=0.01)
    mute = {"held": {"rank 0": [480.0] * 100 + [None] * 110}}
    assert series(**mute).faults() == ["rank 0 did not say what it held"], "another measure is not taken in its place"


def test_what_a_rank_holds_is_its_own_word(tmp_path):
    assert held_mib(tmp_path, 0) is None
    path = health_path(tmp_path, 0)
    path.parent.mkdir()
    for bytes_, mib in ((0, None), (3 << 20, 3.0)):
        path.write_text(Health(0, "host", 1, 1, held=bytes_).to_json())
        assert held_mib(tmp_path, 0) == mib


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"threads": {"rank 0": [12] * 100 + [13] * 110}}, "threads of rank 0: 12 after 20 steps, 13 after 200, 13 at the end"),
        ({"files": {"rank 0": [30] * 100 + [31] * 110}}, "files of rank 0: 30 after 20 steps, 31 after 200, 31 at the end"),
        ({"processes": [4] * 100 + [5] * 110}, "processes: 4 after 20 steps, 5 after 200, 5 at the end"),
        ({"shared": [2] * 100 + [4] * 110}, "shared memory: 2 after 20 steps, 4 after 200, 4 at the end"),
        ({"shared": [2] * 195 + [4] * 15}, "shared memory: 2 after 20 steps, 2 after 200, 4 at the end"),
        ({"left": ["verifier 1"]}, "left at the end: verifier 1"),
    ],
)
def test_what_is_not_given_back_is_named(changes, fault):
    assert series(**changes).faults() == [fault]


def test_a_process_that_was_replaced_is_no_series():
    assert series(mib={"rank 0": [500.0] * 210, "verifier 0": [90.0] * 40}).growth() == {"rank 0": 0.0}


def write_run(folder, rows, *, drawn):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = folder / "checkpoints/step-000002"
    beside = step.with_suffix(".tmp")
    beside.mkdir(parents=True)
    content = dict.fromkeys(NEEDED, b"") | {
        STATE: json.dumps({"sources": {"a": {"epoch": 1, "count": 30, "position": drawn - 30}}}).encode()
    }
    for name, value in content.items():
        (beside / name).parent.mkdir(exist_ok=True)
        (beside / name).write_bytes(value)
    publish(beside, step, describe(beside, [beside / name for name in content]))
    return folder


def row(step, **changes):
    fates = dict.fromkeys((f"ledger/{fate}" for fate in LEDGER_FATES), 0) | {"ledger/trained": 20 * step}
    return {"kind": "train", "step": step, "weight_version": step, "ledger/drawn": 20 * step, "time/step": 1.0} | fates | changes


def test_a_lost_prompt_is_counted(tmp_path):
    good = write_run(tmp_path / "good", [row(1), row(2)], drawn=40)
    assert lost_prompts(good) == 0
    assert last_train(good)["step"] == 2
    assert lost_prompts(write_run(tmp_path / "skipped", [row(1), row(2)], drawn=43)) == 3
    assert lost_prompts(write_run(tmp_path / "fateless", [row(1), row(2, **{"ledger/trained": 38})], drawn=40)) == 2


def test_a_run_is_compared_bit_for_bit_but_for_its_times(tmp_path):
    whole = write_run(tmp_path / "whole", [row(1), row(2, loss=0.1)], drawn=40)
    check = same_as(whole)
    assert check(write_run(tmp_path / "same", [row(1), row(2, loss=0.1, **{"time/step": 9.0})], drawn=40)) == []
    assert check(write_run(tmp_path / "off", [row(1), row(2, loss=0.1 + 2**-56)], drawn=40)) == ["step 2 differs in loss"]
    assert check(write_run(tmp_path / "short", [row(1)], drawn=40)) == ["1 rows of metrics, not 2"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"mismatch/mean": 1e-6, "mismatch/max": 1e-4}, None),
        ({"mismatch/mean": 1e-3}, "step 2: sampler and trainer differ by 0.001 in the mean"),
        ({"mismatch/mean": None}, "step 2: sampler and trainer differ by None in the mean"),
        ({"weight_version": 1}, "step 2: weights of version 1"),
        ({"ledger/trained": 39}, "step 2: the ledger does not add up"),
    ],
)
def test_consistency_where_outputs_may_differ(tmp_path, changes, fault):
    run = write_run(tmp_path / "run", [row(1), row(2, **changes)], drawn=40)
    assert consistent(2, mismatch_bound=1e-5)(run) == ([] if fault is None else [fault])
    assert consistent(3, mismatch_bound=1e-5)(run)[0] == "steps [1, 2]"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("python -m trainer.train demo.yaml --ranks 2", "command"),
        ("python -m torch.distributed.run --standalone -m trainer.train demo.yaml --checked", "torchrun"),
        ("python -u -m trainer.train demo.yaml --checked", "rank"),
        ("python -m rollout.vllm.worker 5", "engine"),
        ("python -c from_multiprocessing.spawn_import_spawn_main --multiprocessing-fork", "spawned"),
        ("python -c from multiprocessing.resource_tracker import main", "helper"),
    ],
)
def test_kinds_of_processes(words, kind):
    assert kind_of(words.split()) == kind


def test_tables_and_pictures(tmp_path):
    outcome = Outcome(kills=[Kill("rank 0", 3.0, 2, gone=1.5), Kill("engine", 9.0, 4), Kill("all", 1.0, 0, 0.2, "left")], runs=1)
    assert outcome.survived == 2
    assert outcome.as_dict()["tried"] == 3
    assert kills_table(outcome).row_count == 3
    assert memory_table(series()).row_count == 2
    assert Series.of(json.loads(json.dumps(series().as_dict()))) == series()
    machine = {"cpu": "some", "date": "2026-01-01", "commit": "abc"}
    (tmp_path / "memory.json").write_text(json.dumps(series().as_dict() | {"engine": "transformers", "machine": machine}))
    assert draw(tmp_path / "memory.json").read_bytes().startswith(b"\x89PNG")


class Scripted:
    """In place of a `Place`: each life is a rank that runs the next of these scripts."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)

    def start(self, _run, mark):
        words = [sys.executable, "-c", self.scripts.pop(0), "trainer.train", "--checked"]
        return subprocess.Popen(words, env=os.environ | {MARK: mark, "RANK": "0"}, start_new_session=True)


SLEEP = "import time; time.sleep(600)"
STRAY = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}'], start_new_session=True); {SLEEP}"


def kill_series(folder, *scripts, kills=1, limit=60.0):
    notes = []
    series = KillSeries(
        Scripted(*scripts), folder, ("rank 0",), kills, seed=0, span=2.0, check=lambda _: [], note=notes.append, limit=limit
    )
    return series.run(), notes


def test_a_life_after_a_death(tmp_path):
    gaps = [row(1, **{"mismatch/mean": 1e-7}), row(2, **{"mismatch/mean": None}), row(3)]
    write_run(tmp_path / "run-0", gaps, drawn=60)
    outcome, notes = kill_series(tmp_path, SLEEP, SLEEP, "", kills=2)
    assert outcome.faults == []
    assert (outcome.survived, outcome.runs, outcome.steps, outcome.prompts, outcome.lost) == (2, 1, 3, 60, 0)
    assert (outcome.mismatch, outcome.unmatched) == (1e-7, 2)
    assert outcome.repeated == 2, "the newest checkpoint is of step 2, each time"
    assert all(kill.gone < 10 for kill in outcome.kills)
    assert [note.split(":")[0] for note in notes] == ["kill 1 of 2", "kill 2 of 2"]


def test_what_outlives_a_kill_is_a_fault_and_does_not_live_on(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "GONE_SECONDS", 1.0)
    write_run(tmp_path / "run-0", [row(1), row(2)], drawn=40)
    marks = []
    monkeypatch.setattr(kills, "new_mark", lambda: marks.append(new_mark()) or marks[-1])
    outcome, _ = kill_series(tmp_path, STRAY, "")
    (fault,) = outcome.faults
    assert fault == "run-0: rank 0 killed: left after 1 s: helper"
    assert outcome.survived == 0
    assert all(wait_until_gone(mark, 10.0) == [] for mark in marks)
    assert len(marks) == 2


@pytest.mark.parametrize(
    ("script", "fault"), [("raise SystemExit(4)", "run-0: exit code 4; read "), (SLEEP, "run-0: not at its end after 1 s; read ")]
)
def test_a_run_that_does_not_come_to_its_end_is_a_fault(tmp_path, script, fault):
    outcome, _ = kill_series(tmp_path, script, kills=0, limit=1.0)
    (found,) = outcome.faults
    assert found.startswith(fault)
    assert outcome.runs == 1
