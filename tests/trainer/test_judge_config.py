"""The judge's section of a configuration, and what a step's row and an evaluation say of samples without a verdict."""

from dataclasses import MISSING, fields

import numpy as np
import pytest
from pydantic import ValidationError

from rollout.reward.judge.settings import JudgeSettings
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.config_reward import JudgeConfig
from trainer.evaluation import summarize
from trainer.preflight import judge_settings
from trainer.step_row import _sampled, unjudged_note

RIGHT, WRONG, NONE = Verdict(True, "right"), Verdict(False, "wrong"), Verdict.unjudged("gone")
URL = "http://127.0.0.1:8000/v1"


def group_of(*verdicts, judge=True):
    """Outputs of 1, 2, 3 … tokens."""
    samples = tuple(Sample(np.zeros(n, np.int32), np.zeros(n, np.float32), "stop", 0) for n in range(1, len(verdicts) + 1))
    return Group(Prompt("q", "?", "!", metadata={"judge": judge}), np.zeros(1, np.int32), samples, verdicts, 0)


def test_the_defaults_are_those_of_the_settings():
    config = JudgeConfig(base_url=URL, model="m")
    settings = judge_settings(config)
    assert settings == JudgeSettings(URL, "m")
    assert {each.name for each in fields(JudgeSettings)} == set(JudgeConfig.model_fields) - {"max_unjudged_rounds"}
    assert [each.name for each in fields(JudgeSettings) if each.default is each.default_factory is MISSING] == [
        "base_url",
        "model",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": "localhost:8000"}, {"base_url": "http://u:p@h/v1"}, {"tries": 0}, {"concurrency": 0}, {"process": "all"},
        {"timeout_seconds": 0}, {"budget_requests": 0}, {"max_thinking_chars": 10}, {"api_key": "sk-1"},
    ],
    ids=repr,
)  # fmt: skip
def test_what_makes_no_judge(changes):
    with pytest.raises(ValidationError):
        JudgeConfig(**{"base_url": URL, "model": "m"} | changes)


def test_rewards_are_over_the_judged_outputs():
    row = _sampled([group_of(RIGHT, WRONG, RIGHT), group_of(RIGHT, NONE, WRONG), group_of(NONE, NONE)])
    assert row["reward/mean"] == pytest.approx(1 / 5)
    assert row["reward/accuracy"] == pytest.approx(3 / 5)
    assert row["verdict/unjudged"] == pytest.approx(3 / 8)
    assert row["length/wrong"] == pytest.approx((2 + 3) / 2)
    assert row["sampling/unjudged"] == 2
    assert "reward/mean" not in _sampled([group_of(NONE)])
    assert "sampling/unjudged" not in _sampled([group_of(RIGHT, WRONG, judge=False)])
    assert _sampled([group_of(RIGHT, WRONG)])["sampling/unjudged"] == 0


def test_the_note_says_how_many_and_why():
    groups = [
        group_of(RIGHT, NONE),
        group_of(NONE, Verdict.unjudged("other"), NONE),
        group_of(RIGHT),
        group_of(WRONG, judge=False),
    ]
    assert unjudged_note(groups) == "2 of 3 groups for the judge failed: 4 samples have no verdict (gone)"
    assert unjudged_note(groups[2:]) is None


def test_an_evaluation_is_over_the_judged_outputs():
    row = summarize([group_of(RIGHT, NONE), group_of(WRONG, RIGHT)])
    assert (row["pass@1"], row["unjudged"]) == (pytest.approx(2 / 3), pytest.approx(1 / 4))
    row = summarize([group_of(NONE, NONE)])
    assert (row["pass@1"], row["unjudged"]) == (None, 1.0)
    assert "unjudged" not in summarize([group_of(RIGHT, WRONG)])
