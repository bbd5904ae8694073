"""A run whose disk refuses checkpoints goes on, ends in one line when it must, and loses nothing: the same command continues, and
the rows are those of a run whose disk never failed."""

import errno
import json
import os
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from tiny_run import write_config

from rollout.errors import InputError
from trainer.checkpoint_folder import folders_of, step_of
from trainer.checkpoint_tensors import Writer
from trainer.config_file import load_config
from trainer.metrics import MetricsWriter, comparable, read_metrics

SHORT = (
    ("every: 1, keep: 20", "every: 1, keep: 1, keep_best: true, max_failures: 2"),
    ("limit: 3}], every: 3", "limit: 3}], every: 1"),
    ("steps: 2\n    context: 48", "steps: 1\n    context: 48"),
)
STEPS = 6


def train(config_path):
    """A whole start of the trainer, in this process, without the figures."""
    from trainer.train import run_rank

    with patch("trainer.train.conclude"):
        assert run_rank(load_config(config_path)) == 0


def refusing(*steps):
    """The disk takes no checkpoint of these steps."""
    write = Writer.write_data

    def perhaps(writer, *arguments):
        if any(f"step-{step:06d}" in str(writer.path) for step in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.path))
        return write(writer, *arguments)

    return patch.object(Writer, "write_data", perhaps)


def rows_of(run):
    return [comparable(row) for row in read_metrics(run)]


def left(run):
    return [step_of(folder) for folder in folders_of(run / "checkpoints")]


def scores_of(run):
    return {row["step"]: row["pass@1"] for row in read_metrics(run) if row["kind"] == "eval" and row["step"]}


def best(scores):
    return max(scores, key=lambda step: (scores[step], step))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("disk") / "whole"
    train(write_config(tiny, run, *SHORT))
    return run


def test_what_stays_at_the_end(whole):
    assert left(whole) == sorted({best(scores_of(whole)), STEPS})


def test_a_disk_that_fails_for_a_while_and_then_for_good(tiny, whole, capsys):
    run = whole.with_name("failing")
    config_path = write_config(tiny, run, *SHORT)
    with refusing(1, 3, 4), pytest.raises(InputError) as caught:
        train(config_path)
    said = [line for line in capsys.readouterr().out.splitlines() if " failed: " in line]
    assert [line.split(" failed: ")[0][-6:] for line in said] == ["step 1", "step 3", "step 4"], said
    assert str(caught.value).startswith("checkpoint of step 4 failed: No space left on device (")
    assert str(caught.value).endswith("the same command continues from the last good one, step-000002")
    assert left(run) == [2]
    counts = [row["checkpoint/failed"] for row in read_metrics(run) if "checkpoint/failed" in row]
    assert counts == sorted(counts)
    assert counts[-1] in (2, 3), "of step 4 it may be known before the next row, and is when the next save is due"
    train(config_path)
    assert rows_of(run) == rows_of(whole)
    scores = {step: score for step, score in scores_of(run).items() if step in (2, 5, 6)}
    assert left(run) == sorted({best(scores), STEPS})


def test_a_disk_that_takes_nothing_at_all_for_a_while_costs_nothing(tiny, whole, capsys):
    """Neither a checkpoint nor a row nor a sample nor TensorBoard's events, of one step."""
    run = whole.with_name("nothing")
    plain, refused = MetricsWriter._append, []

    def full(*_):
        refused.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def perhaps(writer):
        if b'"step": 3' not in writer._waiting:
            return plain(writer)
        with patch.object(writer, "_file", SimpleNamespace(write=full)):
            return plain(writer)

    def events(writer, tag, value, step, *_):
        if step == 3:
            full()

    with (
        refusing(3),
        patch.object(MetricsWriter, "_append", perhaps),
        patch("torch.utils.tensorboard.SummaryWriter.add_scalar", events),
        patch("trainer.sample_recorder.write_step", full),
    ):
        # What waits would be asked for with each row: the disk has space again when step 4 is over.
        original = MetricsWriter.write

        def write(writer, row):
            if row["step"] == 4:
                MetricsWriter._append = plain
            original(writer, row)

        with patch.object(MetricsWriter, "write", write):
            train(write_config(tiny, run, *SHORT))
    said = capsys.readouterr().out
    assert len(refused) > 3
    for line in ("checkpoint of step 3 failed: ", "rows wait in memory", "takes rows again", "TensorBoard's files cannot",
                 "samples of step"):  # fmt: skip
        assert said.count(line) == 1, line
    assert rows_of(run) == rows_of(whole)


def test_no_checkpoint_gets_ahead_of_the_rows_and_a_stop_loses_none(tiny, whole, capsys):
    """The disk refuses the row of step 3, is mended, and the run is asked to stop before another row comes."""
    from trainer.loop import TrainingLoop

    run = whole.with_name("stopped")
    config_path = write_config(tiny, run, *SHORT)
    plain_append, plain_step = MetricsWriter._append, TrainingLoop.train_step
    now = SimpleNamespace(full=False, stopping=False)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def append(writer):
        with patch.object(writer, "_file", SimpleNamespace(write=full) if now.full else writer._file):
            plain_append(writer)

    def step(loop, number):
        now.full, now.stopping = number == 2, number == 3
        return plain_step(loop, number)

    with (
        patch.object(MetricsWriter, "_append", append),
        patch.object(TrainingLoop, "train_step", step),
        patch("trainer.train.Watch.stopping", lambda _: now.stopping),
    ):
        train(config_path)
    said = capsys.readouterr().out
    assert "checkpoint of step 3 failed: " in said
    assert "metrics.jsonl: 2 rows cannot be written" in said, "the evaluation's too"
    assert said.endswith("stopped after step 3; the same command continues\n")
    assert left(run)[-1] == 3
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == [1, 2, 3]
    train(config_path)
    assert rows_of(run) == rows_of(whole)


@pytest.mark.parametrize("where", ["trainer.metrics.replace_text", "trainer.loop.dump_config"])
def test_a_start_on_a_full_disk_is_one_line(tiny, whole, where):
    run = whole.with_name(f"start-{where}")
    config_path = write_config(tiny, run, *SHORT)
    shutil.copytree(whole, run)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "some file"))

    with patch(where, full), pytest.raises(InputError, match=r"some file: No space left on device; free space there"):
        train(config_path)
    train(config_path)
    assert rows_of(run) == rows_of(whole)


def test_the_last_checkpoint_of_a_run_must_stand(tiny, whole):
    run = whole.with_name("last")
    config_path = write_config(tiny, run, *SHORT)
    with refusing(STEPS), pytest.raises(InputError, match=r"checkpoint of step 6 failed: .*continues from .*step-000005"):
        train(config_path)
    assert STEPS - 1 in left(run)
    train(config_path)
    assert rows_of(run) == rows_of(whole)
    assert STEPS in left(run)


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(tiny, whole):
    run = whole.with_name("damaged")
    config_path = write_config(tiny, run, *SHORT)
    (run / "checkpoints/step-000004").mkdir(parents=True)
    (run / "config.yaml").write_text("old: true\n")
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 4}) + "\n")
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"no checkpoint is whole \(step-000004: manifest.json .* name another run"):
        train(config_path)
    assert ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before
    assert left(run) == [4]
