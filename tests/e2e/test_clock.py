"""A clock that is set forwards and back during a run changes nothing: waits and times are measured on one that only goes on."""

import itertools
import time
from unittest.mock import patch

from tiny_run import write_config

from trainer.config_file import load_config
from trainer.metrics import comparable, read_metrics

DAY = 86400.0
SHORTER = ("steps: 3\n    context: 44", "steps: 2\n    context: 44")


def train(config_path):
    from trainer.train import run_rank

    with patch("trainer.train.conclude"):
        assert run_rank(load_config(config_path)) == 0


def test_a_clock_that_jumps_changes_nothing(tiny, tmp_path):
    train(write_config(tiny, tmp_path / "steady", SHORTER))
    offsets, right = itertools.cycle((400 * DAY, 0.0, -30 * DAY, 3 * DAY)), time.time
    with patch("time.time", lambda: right() + next(offsets)):
        train(write_config(tiny, tmp_path / "jumping", SHORTER))
    steady, jumping = (read_metrics(tmp_path / name) for name in ("steady", "jumping"))
    assert [comparable(row) for row in jumping] == [comparable(row) for row in steady]
    for row in jumping:
        assert all(0 <= value < 600 for name, value in row.items() if name.startswith("time/")), row
    assert (tmp_path / "jumping/checkpoints/step-000006/manifest.json").exists()
