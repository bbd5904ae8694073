"""A run whose numbers go bad: what it skips, keeps and says, when it stops, and that it goes on as if it had not been stopped."""

import errno
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from test_repeatable import rows_of, state_of, stopped_after, train
from tiny_run import ROOT, write_config

from rollout.cli import code_of
from rollout.errors import EngineError, InputError, RunStopped
from rollout.sampler import Sampler
from trainer.cli import EXIT_STOPPED, run
from trainer.hang_report import Health
from trainer.quarantine import kept_folders, read_batch
from trainer.report_writer import health_path


@contextmanager
def spoilt(steps):
    """The batches of these steps (from 0) come with a NaN among the log-probabilities of each output. Not from the engine itself:
    the probe of the push before would refuse that."""
    plain = Sampler.collect

    def spoiling(self, draw, *arguments):
        collected = plain(self, draw, *arguments)
        for group in collected.batch if draw.step in steps else ():
            for sample in group.samples:
                sample.logprobs[0] = math.nan
        return collected

    with patch.object(Sampler, "collect", spoiling):
        yield


def train_rows(path):
    return [row for row in rows_of(path) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """(run, its configuration, the line it ended with) of a run that met bad numbers in steps 1, 3, 4 and 5."""
    run_folder = tmp_path_factory.mktemp("guarded") / "stopped"
    config_path = write_config(tiny, run_folder)
    with spoilt({0, 2, 3, 4}), pytest.raises(RunStopped) as caught:
        train(config_path)
    return run_folder, config_path, str(caught.value)


def test_three_steps_in_a_row_stop_the_run_with_a_checkpoint(stopped):
    run_folder, _, line = stopped
    assert line.startswith("steps 3 to 5 each had a mini-batch that could not be trained on, the last for its sampled log-prob")
    assert f"what was left out is in {run_folder}/quarantine" in line
    assert line.endswith("stopped after step 5, which is kept: the same command continues from there")
    rows = train_rows(run_folder)
    assert [row["guard/skipped"] for row in rows] == [2, 0, 2, 2, 2]
    assert state_of(run_folder, 5)["updates"] == 2, "nothing was applied but step 2's two mini-batches"
    assert rows[0]["mismatch/mean"] is None
    assert rows[0]["alarm/mismatch"] == 1
    kept = kept_folders(run_folder / "quarantine")
    assert [folder.name for folder in kept] == [f"step-{step:06d}-mini-{mini}" for step in (1, 3, 4, 5) for mini in (0, 1)]
    batch = read_batch(kept[2])
    assert len(batch.groups) == 2
    assert all(math.isnan(sample.logprobs[0]) for group in batch.groups for sample in group.samples)
    assert all(
        len(logprobs) == len(sample.token_ids) and (logprobs <= 0).all()
        for group, recomputed in zip(batch.groups, batch.recomputed, strict=True)
        for sample, logprobs in zip(group.samples, recomputed, strict=True)
    )


def test_it_goes_on_and_counts_on(stopped, tiny, capsys):
    """A bad step after the stop ends it at once; a good one begins the count anew."""
    run_folder, _, _ = stopped
    again = stopped_after(5, run_folder, tiny, "counted")
    with spoilt({5}), pytest.raises(RunStopped, match="steps 3 to 6 each"):
        train(again)
    capsys.readouterr()
    on = stopped_after(5, run_folder, tiny, "gone on")
    with spoilt({6}):
        train(on)
    assert "step 7: mini-batch 1 of 2 not trained on: its sampled log-probability is not finite" in capsys.readouterr().out
    rows = train_rows(on.with_suffix(""))
    assert [row["guard/skipped"] > 0 for row in rows] == [True, False, True, True, True, False, True]


def test_a_stop_among_bad_steps_changes_nothing(tiny, tmp_path):
    whole = tmp_path / "whole"
    limit = ("seed: 3", "seed: 3\nguards: {max_skipped: 6, keep: 3}")
    with spoilt({1, 2, 4}):
        train(write_config(tiny, whole, limit))
        config_path = stopped_after(3, whole, tiny, "resumed")
        write_config(tiny, whole.with_name("resumed"), limit)
        train(config_path)
    assert rows_of(whole.with_name("resumed")) == rows_of(whole)
    assert len(kept_folders(whole / "quarantine")) == 3


def test_all_ranks_skip_alike_and_stop_with_one_word_for_good(tiny, tmp_path):
    """torchrun may start them again, and must not get on."""
    run_folder = tmp_path / "two"
    config_path = write_config(tiny, run_folder, ("seed: 3", "seed: 3\nguards: {max_skipped: 2}"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    ended = subprocess.run(
        [*command, ROOT / "tests/e2e/spoilt_run.py", config_path, "--checked"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "SPOILT": "1,2", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode != 0
    why = "steps 2 to 3 each had a mini-batch that could not be trained on, the last for its recomputed"
    own, again = (line for line in dict.fromkeys(ended.stderr.splitlines()) if line.startswith("keju: error: "))
    assert own.startswith(f"keju: error: {why}")
    assert again.startswith(f"keju: error: {run_folder}: not started again, as it stopped of its own: {why}")
    assert ended.stderr.count(again) == 1, "one rank says so, once"
    for rank in (0, 1):
        health = Health.from_json(health_path(run_folder, rank).read_text(encoding="utf-8"))
        assert (health.end, health.code) == ("ended: RunStopped", 3)
        assert health.why == own.removeprefix("keju: error: ")
    assert [row["guard/skipped"] for row in train_rows(run_folder)] == [0, 2, 2]
    assert state_of(run_folder, 3)["updates"] == 2
    batch = read_batch(kept_folders(run_folder / "quarantine")[0])
    lost = []
    for group, recomputed in zip(batch.groups, batch.recomputed, strict=True):
        assert [len(logprobs) for logprobs in recomputed] == [len(sample.token_ids) for sample in group.samples]
        lost += [math.isnan(logprobs[0]) for logprobs in recomputed]
    assert 0 < sum(lost) < len(lost) == 8, "those that rank 1 scored"


ALARMED = "seed: 3\nalarms: {steps: 2, entropy_steps: 1, entropy_band: [0.99, 1.01], length: 0.98, recovery_empty: 1}"


@pytest.fixture(scope="module")
def alarmed(tiny, tmp_path_factory):
    run_folder = tmp_path_factory.mktemp("alarmed") / "whole"
    train(write_config(tiny, run_folder, ("seed: 3", ALARMED)))
    return run_folder


def test_a_stop_keeps_the_alarms_as_they_were(alarmed, tiny):
    values = {value for row in train_rows(alarmed) for key, value in row.items() if key.startswith("alarm/")}
    assert values == {0, 1}, "the run must have alarms for this to show anything"
    config_path = stopped_after(4, alarmed, tiny, "stopped")
    write_config(tiny, alarmed.with_name("stopped"), ("seed: 3", ALARMED))
    train(config_path)
    assert rows_of(alarmed.with_name("stopped")) == rows_of(alarmed)


def test_an_alarm_that_may_stops_the_run(tiny, tmp_path, capsys):
    run_folder = tmp_path / "told"
    config_path = write_config(tiny, run_folder, ("seed: 3", ALARMED.replace("}", ", stop: [entropy]}")))
    with pytest.raises(RunStopped, match=r"^alarm entropy: .* band .*; alarms.stop names it; look at .*stopped after"):
        train(config_path)
    assert "ALARM entropy: mean entropy" in capsys.readouterr().out
    steps = [row["step"] for row in train_rows(run_folder)]
    assert (run_folder / f"checkpoints/step-{steps[-1]:06d}").is_dir()
    assert train_rows(run_folder)[-1]["alarm/entropy"] == 1
    assert all(row.get("alarm/entropy", 0) == 0 for row in train_rows(run_folder)[:-1])


@pytest.mark.parametrize(("error", "code"), [(RunStopped("a\nb"), EXIT_STOPPED), (EngineError("a b"), 3), (InputError("a b"), 2)])
def test_how_a_command_ends(error, code, capsys):
    def main(_arguments):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == "keju: error: a b\n"
    assert EXIT_STOPPED == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_line_and_another_error_a_defect(number, capsys):
    def main(_arguments):
        raise OSError(number, os.strerror(number), "/mnt/out/model.safetensors")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code_of(OSError(number, "", "x")) == 2
    line = f"keju: error: /mnt/out/model.safetensors: {os.strerror(number)}; free space there, or name another place\n"
    assert capsys.readouterr().err == line

    for error in (FileNotFoundError(errno.ENOENT, "no such file", "x"), OSError(number, "of what file nobody knows")):

        def defect(_arguments, error=error):
            raise error

        with pytest.raises(type(error)):
            run(defect)
        assert code_of(error) == 1


def test_a_configuration_says_what_its_guards_are(alarmed):
    written = json.dumps((alarmed / "config.yaml").read_text())
    assert "max_skipped: 3" in written
    assert "entropy_steps: 1" in written
