"""A run that was stopped at any point and started again is, bit for bit, the run that was never stopped.

Compared are the metrics rows without what the clock says: rewards, losses, entropies, gradient norms and the ledger of prompts,
so a lost cursor, a lost buffer, a lost moment of the optimizer or a seed that drifts shows in the next row; and what is kept of
each step's samples, byte for byte.

A stop after step k is the folder as it was then: the checkpoints of later steps are taken away, the metrics keep their later
rows, as after a kill they may. One test kills with SIGKILL. All runs here are on CPU; on a GPU equality is not promised.
"""

import json
import os
import shutil
import signal
import time
from unittest.mock import patch

import pytest
from tiny_run import command, write_config

from trainer.config_file import load_config
from trainer.metrics import comparable, read_metrics

pytestmark = pytest.mark.long
INSIDE_STAGE_1, LAST_OF_STAGE_1, INSIDE_STAGE_2, LAST_OF_STAGE_2 = 1, 2, 4, 5
STEPS = 7


def rows_of(run):
    return [comparable(row) for row in read_metrics(run)]


def samples_of(run):
    return {path.name: path.read_bytes() for path in sorted((run / "samples").iterdir())}


def same(run, whole):
    return rows_of(run) == rows_of(whole) and samples_of(run) == samples_of(whole)


def train(config_path):
    """A whole start of the trainer, in this process, without the figures."""
    from trainer.train import run_rank

    with patch("trainer.train.conclude"):
        assert run_rank(load_config(config_path)) == 0


def train_on_two_ranks(config_path):
    process = command(config_path, "--ranks", "2")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors


def stopped_after(step, whole, tiny, name):
    """Copy of the run folder `whole` as a stop after `step` leaves it. Returns its configuration."""
    run = whole.with_name(name)
    shutil.copytree(whole, run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return write_config(tiny, run)


def state_of(run, step):
    return json.loads((run / f"checkpoints/step-{step:06d}/state.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The run that nothing stopped."""
    run = tmp_path_factory.mktemp("repeatable") / "whole"
    train(write_config(tiny, run))
    return run


@pytest.fixture(scope="module")
def whole_on_two_ranks(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("repeatable2") / "whole"
    train_on_two_ranks(write_config(tiny, run))
    return run


def check_that_the_run_exercises_what_it_should(run):
    rows = [row for row in rows_of(run) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1, 2, 2]
    assert rows[-1]["ledger/recovered"] > 0
    assert rows[-1]["ledger/uniform"] > 0
    assert all(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        fates = sum(row[f"ledger/{fate}"] for fate in ("trained", "uniform", "recovered", "expired", "failed"))
        assert row["ledger/drawn"] == fates + row["recovery/size"]
    assert state_of(run, INSIDE_STAGE_2)["buffer"], "the buffer must not be empty at a stop inside a stage"
    assert state_of(run, LAST_OF_STAGE_2)["buffer"], "the buffer must not be empty at a stop between two stages"


def test_the_same_seed_twice(tiny, whole):
    check_that_the_run_exercises_what_it_should(whole)
    again = whole.with_name("again")
    train(write_config(tiny, again))
    assert same(again, whole)
    assert len(samples_of(again)) == STEPS
    other = whole.with_name("other")
    train(write_config(tiny, other, ("seed: 3", "seed: 4"), ("steps: 2\n    context: 40", "steps: 1\n    context: 40")))
    assert rows_of(other)[1]["step"] == 1
    assert rows_of(other)[1]["loss/policy"] != rows_of(whole)[1]["loss/policy"], "the seed must matter"


@pytest.mark.parametrize("step", [INSIDE_STAGE_1, LAST_OF_STAGE_1, INSIDE_STAGE_2, LAST_OF_STAGE_2])
def test_a_stop_changes_nothing(tiny, whole, step):
    config_path = stopped_after(step, whole, tiny, f"stopped{step}")
    train(config_path)
    assert same(load_config(config_path).run, whole)


def test_a_finished_run_started_again_stays_as_it_is(tiny, whole):
    config_path = stopped_after(STEPS, whole, tiny, "finished")
    train(config_path)
    assert same(load_config(config_path).run, whole)


def test_a_kill_changes_nothing(tiny, whole, capsys):
    run = whole.with_name("killed")
    config_path = write_config(tiny, run, ("every: 1, keep: 20", "every: 2, keep: 20"))
    process = command(config_path)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step-000004").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "checkpoints/step-000007").exists(), "killed too late to show anything"
    capsys.readouterr()
    train(config_path)
    assert "continuing after step" in capsys.readouterr().out
    assert same(run, whole)


@pytest.mark.parametrize("damaged", ["a shard", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, whole, capsys, damaged):
    config_path = stopped_after(LAST_OF_STAGE_2, whole, tiny, f"damaged {damaged}")
    run = load_config(config_path).run
    folder = run / f"checkpoints/step-{LAST_OF_STAGE_2:06d}"
    path = max(folder.glob("dcp/*"), key=lambda path: path.stat().st_size) if damaged == "a shard" else folder / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    train(config_path)
    said = capsys.readouterr().out
    assert f"checkpoint {folder.name} skipped: " in said
    assert path.name in said
    assert f"continuing after step {LAST_OF_STAGE_2 - 1}" in said
    assert rows_of(run) == rows_of(whole)


def test_a_damaged_newer_checkpoint_does_not_push_a_whole_one_out(tiny, whole):
    """keep: 1, and the newest of all is damaged: after the next step there must still be one to continue from."""
    config_path = stopped_after(INSIDE_STAGE_2, whole, tiny, "pushed")
    config_path.write_text(config_path.read_text().replace("keep: 20", "keep: 1"))
    run = load_config(config_path).run
    (run / "checkpoints/step-000004/state.json").write_text("{}")
    shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/step-000099")
    (run / "checkpoints/step-000098.tmp").mkdir()
    train(config_path)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{STEPS:06d}"]
    assert rows_of(run) == rows_of(whole)


def test_other_prompts_are_refused_and_the_folder_keeps_its_configuration(tiny, whole):
    from rollout.errors import InputError

    config_path = stopped_after(INSIDE_STAGE_2, whole, tiny, "other prompts")
    run = load_config(config_path).run
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    fewer = tiny / "fewer.jsonl"
    fewer.write_text("".join((tiny / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    state = state_of(run, INSIDE_STAGE_2)
    assert list(state["sources"]) == [str(tiny / "train.jsonl")]
    content = (tiny / "train.jsonl").read_bytes()
    (tiny / "train.jsonl").write_bytes(fewer.read_bytes())
    try:
        with pytest.raises(InputError, match="saved over other prompts"):
            train(config_path)
    finally:
        (tiny / "train.jsonl").write_bytes(content)
    assert ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_a_stop_changes_nothing_on_two_ranks(tiny, whole_on_two_ranks):
    check_that_the_run_exercises_what_it_should(whole_on_two_ranks)
    config_path = stopped_after(INSIDE_STAGE_2, whole_on_two_ranks, tiny, "stopped")
    train_on_two_ranks(config_path)
    assert same(load_config(config_path).run, whole_on_two_ranks)


def test_an_interrupt_ends_every_rank_with_a_checkpoint(tiny, whole_on_two_ranks):
    config_path = stopped_after(INSIDE_STAGE_1, whole_on_two_ranks, tiny, "interrupted")
    run = load_config(config_path).run
    process = command(config_path, "--ranks", "2")
    while not (run / f"checkpoints/step-{INSIDE_STAGE_1 + 1:06d}").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    first_rank = json.loads((run / "run.lock").read_text())["pid"]
    assert first_rank != process.pid
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    (line,) = [line for line in output.splitlines() if line.startswith("stopped after step ")]
    step = int(line.removesuffix("; the same command continues").split()[-1])
    assert (run / f"checkpoints/step-{step:06d}/manifest.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(first_rank, 0)
    assert not (run / f"checkpoints/step-{STEPS:06d}").exists(), "interrupted too late to show anything"
    train_on_two_ranks(config_path)
    assert same(run, whole_on_two_ranks)


def test_a_checkpoint_of_two_ranks_continues_on_one(tiny, whole_on_two_ranks):
    config_path = stopped_after(INSIDE_STAGE_2, whole_on_two_ranks, tiny, "narrower")
    run = load_config(config_path).run
    saved = state_of(run, INSIDE_STAGE_2)
    train(config_path)
    rows = [row for row in rows_of(run) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows_of(run)[: INSIDE_STAGE_2 + 2] == rows_of(whole_on_two_ranks)[: INSIDE_STAGE_2 + 2], "the past stays"
    last, following = rows[INSIDE_STAGE_2 - 1], rows[INSIDE_STAGE_2]
    assert {name: last[f"ledger/{name}"] for name in saved["ledger"]} == saved["ledger"]
    assert following["ledger/drawn"] == last["ledger/drawn"] + 14 * following["sampling/rounds"]
    gone = sum(following[f"ledger/{fate}"] - last[f"ledger/{fate}"] for fate in ("recovered", "expired"))
    assert gone >= len(saved["buffer"]) > 0, "the buffer came along"
    assert following["ledger/recovered"] > last["ledger/recovered"]
    assert following["lr"] == rows_of(whole_on_two_ranks)[INSIDE_STAGE_2 + 2]["lr"]
