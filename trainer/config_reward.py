"""The section `reward` of a configuration (`trainer.config`): the rule, the repetition filter, the judge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rollout.reward.judge.settings import address_fault
from rollout.reward.rules import RULES
from trainer.config_secrets import NoSecrets, VariableName
from trainer.config_section import Positive, Section


class RepetitionConfig(Section):
    """When a text of n tokens counts as repetitive (`rollout.reward.repetition.RepetitionLimits`). The paper has no numbers."""

    ngram: Positive = 20
    min_covered: float = Field(default=0.2, gt=0, le=1)
    min_count: int = Field(default=5, ge=3)
    min_tokens: Positive = 64
    min_counting_tokens: Positive = 640
    max_ngram_share: float = Field(default=0.33, gt=0, le=1)


class JudgeConfig(Section):
    """An OpenAI-compatible endpoint that judges the prompts whose metadata says "judge": true
    (`rollout.reward.judge.settings.JudgeSettings` says what each key means)."""

    base_url: str
    model: str
    api_key_env: VariableName = "KEJU_JUDGE_API_KEY"
    process: Literal["thinking", "answer", "off"] = "thinking"
    process_counts: bool = True
    concurrency: Positive = 16
    tries: Positive = 4
    timeout_seconds: float = Field(default=60.0, gt=0)
    deadline_seconds: float = Field(default=300.0, gt=0)
    budget_requests: Positive | None = None
    budget_tokens: Positive | None = None
    max_tokens: Positive | None = 1024
    temperature: float | None = Field(default=0.0, ge=0)
    reason_chars: Positive | None = 600
    max_answer_chars: Positive = 8000
    max_thinking_chars: Annotated[int, Field(ge=1000)] = 24000
    extra_body: NoSecrets = Field(default_factory=dict)
    max_unjudged_rounds: Positive = 3
    """After so many sampling rounds in a row without any verdict of a judge that was asked, the run stops and keeps what it
    learnt."""

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if (fault := address_fault(value)) is not None:
            raise ValueError(fault)
        return value


class RewardConfig(Section):
    rule: Literal[tuple(RULES)] = "math-verify"
    timeout_seconds: float = Field(default=10.0, gt=0)
    """For one answer."""
    batch_seconds: float | None = Field(default=None, gt=0)
    """For all answers of a batch, shared among them as `rollout.reward.rule` says; None: timeout_seconds, and half a second for
    each answer on one worker."""
    workers: Positive = 1
    """Verifier processes on each rank."""
    judge: JudgeConfig | None = None
    """None: no prompt may ask for one."""
    repetition: RepetitionConfig = RepetitionConfig()
