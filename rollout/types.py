"""What crosses the borders between the stages of a step, as frozen dataclasses.

Example, one prompt with G = 2 outputs:
    Prompt(id="gsm8k-00001", question="… how many altogether?", answer="72")
    Sample(token_ids=[27, 9, …, 2], logprobs=[-0.1, …], finish_reason="stop", weight_version=12)     twice
    Verdict(right=True, reason="right"), Verdict(right=False, reason="truncated")
    Group(prompt, prompt_token_ids=[1, 5, …], samples=(…), verdicts=(…), drawn_step=12)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]
UNJUDGED = "unjudged"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its ground truth, as the prompts file gives it. `id` is unique in its file."""

    id: str
    question: str
    answer: str
    source: str = ""
    solution: str | None = None
    """A worked solution, for the supervised warm-up only; None where the file has none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever a scorer needs beside the answer (reasoning-gym's entry, for one)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled output. token_ids: int32 [n], with the end token if it was sampled; logprobs: float32 [n], nats, under the
    distribution that was sampled from (temperature included). n ≥ 1."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    weight_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reward's decision on one sample. `reason` is one word for the metrics: right, wrong, process (the final answer is right
    and the way to it is not), truncated, format, repetition, timeout, error, unjudged; `detail` says where and why, for a reader.

    unjudged: the judge gave no verdict, so the sample is neither right nor wrong, has no reward, and takes its group with it."""

    right: bool
    reason: str
    detail: str = ""
    mixed: bool = False
    """Whether the output mixes languages (`rollout.reward.languages`): measured, without influence on `right`."""

    @classmethod
    def unjudged(cls, why: str) -> Verdict:
        return cls(False, UNJUDGED, why)

    @property
    def judged(self) -> bool:
        return self.reason != UNJUDGED

    @property
    def reward(self) -> int:
        """R of the paper: 1 where right, else -1. Raises ValueError for a sample that was not judged."""
        if not self.judged:
            raise ValueError(f"a sample without a verdict has no reward ({self.detail})")
        return 1 if self.right else -1


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its G samples and their verdicts. prompt_token_ids: int32 [m], as the engine was fed."""

    prompt: Prompt
    prompt_token_ids: np.ndarray
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]
    drawn_step: int

    @property
    def rewards(self) -> tuple[int, ...]:
        return tuple(verdict.reward for verdict in self.verdicts)

    @property
    def right(self) -> int:
        """How many of the G samples are right."""
        return sum(verdict.right for verdict in self.verdicts)

    @property
    def judged(self) -> bool:
        """Whether every sample has a verdict; a group without is counted as failed and never trained on."""
        return all(verdict.judged for verdict in self.verdicts)
