"""What the trainer makes of the reward's verdicts: its limits, the step's metrics, and the checkpoint's groups."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from rollout.reward.repetition import RepetitionLimits
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.checkpoint_state import pack_groups, unpack_groups
from trainer.config_reward import RepetitionConfig
from trainer.step_row import _sampled


def group(*verdicts: Verdict) -> Group:
    samples = tuple(Sample(np.arange(4, dtype=np.int32), np.zeros(4, np.float32), "stop", 1) for _ in verdicts)
    return Group(Prompt("p", "q", "a"), np.arange(2, dtype=np.int32), samples, verdicts, drawn_step=1)


RIGHT, MIXED = Verdict(True, "right"), Verdict(False, "wrong", "4 is not 5", mixed=True)


def test_the_configuration_has_the_limits_of_the_detector():
    assert RepetitionConfig().model_dump() == asdict(RepetitionLimits())


def test_a_step_reports_the_share_of_mixed_outputs():
    row = _sampled([group(RIGHT, MIXED), group(RIGHT, RIGHT)])
    assert row["language/mixed"] == pytest.approx(0.25)
    assert row["reward/mean"] == pytest.approx(0.5)
    assert _sampled([group(RIGHT)])["language/mixed"] == 0.0


def test_a_checkpoint_keeps_it():
    records, arrays = pack_groups([group(RIGHT, MIXED)])
    assert unpack_groups(json.loads(json.dumps(records)), arrays)[0].verdicts == (RIGHT, MIXED)
