"""A run that is asked to stop does so where it can, keeps a checkpoint, and continued it is bit for bit the run never stopped.

Here the request comes at a stated place of a run on one rank, in this process: a real signal, or the file. Checkpoints are rare,
so that what is found is the stop's own. On two ranks: test_repeatable.py and test_orphans.py.
"""

import os
import signal
import time
from unittest.mock import patch

import pytest
from tiny_run import write_config

from trainer.config_file import load_config
from trainer.metrics import comparable, read_metrics

RARELY = ("every: 1, keep: 20", "every: 100, keep: 20")
EVALUATED = ("every: 3, k: 2", "every: 4, k: 2")
"""So that an evaluation follows step AT + 1."""
STEPS = 7
AT = 3
"""The step, from 0, in which the request comes; the evaluation is the one after it."""


def rows_of(run):
    return [comparable(row) for row in read_metrics(run)]


def train(config_path):
    from trainer.train import run_rank

    with patch("trainer.train.conclude"):
        assert run_rank(load_config(config_path)) == 0


class Request:
    """Asks once, and waits until it was heard. how: "file" or a signal."""

    def __init__(self, run, how):
        self.run, self.how, self.watch, self.step, self.made = run, how, None, None, False

    def make(self):
        if self.made:
            return
        self.made = True
        if self.how == "file":
            (self.run / "stop").touch()
        else:
            os.kill(os.getpid(), self.how)
        end = time.monotonic() + 30
        while not self.watch.stopping():
            assert time.monotonic() < end, "nobody heard"
            time.sleep(0.01)

    def before(self, plain, when):
        """`plain`, with the request made before it in step AT where `when` holds."""

        def asked(*arguments, **options):
            if self.step == AT and when(*arguments):
                self.make()
            return plain(*arguments, **options)

        return asked


@pytest.fixture
def stopped_at(monkeypatch):
    """(place, run, how) → patches the trainer so that the request comes there."""
    from rollout import transformers_engine
    from trainer import actor, loop, train
    from trainer.checkpoint import Checkpoints

    def prepare(place, run, how):
        request = Request(run, how)

        class Heard(train.Watch):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                request.watch = self

        plain_step = loop.TrainingLoop.train_step

        def step(loop_, number):
            request.step = number
            if place == "between" and number == AT:
                request.make()
            return plain_step(loop_, number)

        monkeypatch.setattr(train, "Watch", Heard)
        monkeypatch.setattr(loop.TrainingLoop, "train_step", step)
        always = lambda *_: True  # noqa: E731
        if place == "sampling":
            each_token = transformers_engine._EachToken
            in_sampling = lambda token, *_: token._count == 1  # noqa: E731
            monkeypatch.setattr(each_token, "__call__", request.before(each_token.__call__, in_sampling))
        elif place == "update":
            monkeypatch.setattr(actor, "linear_policy_loss", request.before(actor.linear_policy_loss, always))
        elif place == "evaluation":
            monkeypatch.setattr(loop, "evaluate", request.before(loop.evaluate, always))
        elif place == "checkpoint":
            monkeypatch.setattr(Checkpoints, "save", request.before(Checkpoints.save, always))
        return request

    return prepare


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("stop") / "whole"
    train(write_config(tiny, run, RARELY, EVALUATED))
    return rows_of(run)


@pytest.mark.parametrize(
    ("place", "how", "finished"),
    [
        ("sampling", "file", AT),
        ("between", signal.SIGINT, AT),
        ("update", signal.SIGTERM, AT + 1),
        ("evaluation", signal.SIGTERM, AT + 1),
    ],
)
def test_stopped_anywhere_and_continued_it_is_the_run_never_stopped(
    tiny, whole, tmp_path, stopped_at, monkeypatch, capsys, place, how, finished
):
    run = tmp_path / "run"
    config_path = write_config(tiny, run, RARELY, EVALUATED)
    with monkeypatch.context():
        request = stopped_at(place, run, how)
        train(config_path)
        assert request.made
    monkeypatch.undo()
    assert capsys.readouterr().out.endswith(f"\nstopped after step {finished}; the same command continues\n")
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{finished:06d}"]
    assert not (run / "stop").exists()
    rows = rows_of(run)
    assert rows == whole[: len(rows)]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, finished + 1))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0], "that of step 4 was cut short, or not begun"
    train(config_path)
    assert f"continuing after step {finished}" in capsys.readouterr().out
    assert rows_of(run) == whole


def test_a_stop_where_a_checkpoint_is_written_anyway_writes_no_other(tiny, tmp_path, stopped_at, capsys):
    from trainer.checkpoint import Checkpoints

    run = tmp_path / "run"
    stopped_at("checkpoint", run, signal.SIGTERM)
    written = []
    plain = Checkpoints._save
    note = lambda self, actor, state, *more: (written.append(state.step), plain(self, actor, state, *more))  # noqa: E731
    with patch.object(Checkpoints, "_save", note):
        train(write_config(tiny, run, ("every: 1, keep: 20", "every: 4, keep: 20")))
    assert written == [AT + 1]
    assert f"stopped after step {AT + 1};" in capsys.readouterr().out


def test_a_stop_before_anything_was_learnt_keeps_nothing_and_the_run_begins_anew(tiny, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    config_path = write_config(tiny, run, RARELY, EVALUATED)
    with patch("trainer.train.Watch.stopping", lambda self: True):
        train(config_path)
    assert "stopped after step 0; the same command continues\n" in capsys.readouterr().out
    assert not list(run.glob("checkpoints/step-*"))
    train(config_path)
    assert rows_of(run) == whole


def test_a_stop_in_the_last_step_ends_with_it_and_what_is_owed_comes_later(
    tiny, whole, tmp_path, stopped_at, monkeypatch, capsys
):
    monkeypatch.setattr("test_stop.AT", STEPS - 1)
    run = tmp_path / "run"
    config_path = write_config(tiny, run, RARELY, EVALUATED)
    stopped_at("update", run, signal.SIGTERM)
    train(config_path)
    assert f"stopped after step {STEPS};" in capsys.readouterr().out
    assert rows_of(run) == whole[:-1]
    monkeypatch.undo()
    train(config_path)
    assert rows_of(run) == whole
