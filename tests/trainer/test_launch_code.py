"""What a command that starts torchrun ends with: the ranks' own exit code, which torchrun does not tell."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from rollout.cli import code_of
from rollout.errors import EngineError, InputError, RunStopped
from trainer import launch
from trainer.config import CheckpointConfig
from trainer.hang_report import Health
from trainer.report_writer import health_path


class Ended:
    """In place of torchrun: at its end the ranks have left `healths`, and a report where `hung`."""

    def __init__(self, run, code, healths, hung=False):
        self.run, self.code, self.healths, self.hung = run, code, healths, hung

    def __call__(self, *_arguments, **_options):
        return self

    def wait(self):
        for health in self.healths:
            path = health_path(self.run, health.rank)
            path.write_text(health.to_json())
            os.utime(path, ns=(5, 5))
        if self.hung:
            (self.run / "health/report-20260101T000000Z.txt").write_text("rank 1: …")
        return self.code


def ended(rank, code):
    return Health(rank, "host", 1, 1, end="ended" if not code else "ended: some error", code=code)


@pytest.mark.parametrize(
    ("torchrun", "ranks", "hung", "code"),
    [
        (0, [0, 0], False, 0),
        (1, [2, 2], False, 2),
        (1, [3, 3], False, 3),
        (1, [1, 1], False, 1),
        (1, [0, 3], False, 3),
        (1, [], False, 1),
        (1, [1, 1], True, 3),
    ],
)
def test_the_code_is_the_ranks(tmp_path, monkeypatch, torchrun, ranks, hung, code):
    health_path(tmp_path, 0).parent.mkdir()
    health_path(tmp_path, 7).write_text(ended(7, 2).to_json())  # of an earlier start
    healths = [ended(rank, each) for rank, each in enumerate(ranks)]
    monkeypatch.setattr(launch.subprocess, "Popen", Ended(tmp_path, torchrun, healths, hung))
    options = Namespace(ranks=2, restarts=0, config="c.yaml", overrides=[])
    config = Namespace(run=tmp_path, checkpoint=CheckpointConfig())
    assert launch.torchrun("trainer.train", options, config) == code


def test_codes_of_errors():
    assert [code_of(error("x")) for error in (InputError, EngineError, RunStopped, ValueError)] == [2, 3, 3, 1]


STARTS = """
import signal, sys
from argparse import Namespace
from pathlib import Path
from trainer import launch
from trainer.config import CheckpointConfig
class Torchrun:
    def __init__(self, *_arguments, **_options): pass
    def wait(self): print("ready", flush=True); sys.stdin.read(); return 0
launch.subprocess.Popen = Torchrun
launch.torchrun("trainer.train", Namespace(ranks=2, restarts=0, config="c.yaml", overrides=[]),
                Namespace(run=Path(sys.argv[1]), checkpoint=CheckpointConfig()))
"""


@pytest.mark.parametrize("ignored", [True, False])
def test_a_run_under_nohup_outlives_the_connection(tmp_path, ignored):
    ignore = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    with subprocess.Popen([sys.executable, "-c", STARTS, tmp_path], cwd=Path(__file__).parents[2], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, preexec_fn=ignore) as process:  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + (0.5 if ignored else 30)
        while not (tmp_path / "stop").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.stdin.close()
        assert process.wait(60) == 0
    assert (tmp_path / "stop").exists() is not ignored
