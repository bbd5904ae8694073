"""What an evaluation makes of an output: whether its final answer is right, and what the training's reward would have said.

The two are not the same. The reward gives nothing for a right answer in a wrong form, or behind repeated text. The paper compares
with models that never saw its form, so its correctness is that of the final answer, and here too:

    right      the rule's verdict on the final answer, whatever the form (`rollout.reward.final_answer`); an output that did not
               end within its tokens has none and is wrong
    rewarded   the reward's verdict: R = 1
    reason     the reward's, so the shares of format failures and the like are the training's

An output that the reward's judge left unjudged is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollout.reward.correctness import Rule
from rollout.reward.final_answer import chosen_letters, final_answer
from rollout.reward.format import Response, parse_response
from rollout.reward.pipeline import Verifier
from rollout.reward.tokens import Reader
from rollout.types import Prompt, Sample, Verdict

FORM = ("format", "repetition")
"""Reasons of the reward's filter under which an output still has a final answer."""


class Reward(Protocol):
    """`rollout.reward.pipeline.Reward` is one."""

    def judge(self, prompt_samples: Sequence[tuple[Prompt, Sample]]) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True)
class Grade(Verdict):
    """A verdict whose `right` is of the final answer; reason, detail and mixed are the reward's."""

    rewarded: bool = False
    answer: str | None = None
    """The final answer; None where there is none."""
    repetitive: bool = False
    """Whether the output as a whole repeats itself, truncated ones and those without the form too."""
    text: str = ""
    """Special tokens are visible; without the end token."""


class ChoiceRule:
    """`rollout.reward.correctness.Rule` that compares multiple-choice answers as letters, and leaves the rest to `rule`."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def verify(self, pairs: list[tuple[Prompt, str]]) -> list[Verdict]:
        others = [pair for pair in pairs if not pair[0].metadata.get("choice")]
        judged = iter(self._rule.verify(others) if others else ())
        return [_choice(prompt, answer) if prompt.metadata.get("choice") else next(judged) for prompt, answer in pairs]

    def close(self) -> None:
        self._rule.close()


class Grader:
    """`rollout.lane.Judge`, whose verdicts are grades. verifier: the reward's. find_repetition: the reward's, too. prefill: what
    the prompts end with."""

    def __init__(
        self,
        reward: Reward,
        verifier: Verifier,
        reader: Reader,
        find_repetition: Callable[[np.ndarray], str | None],
        *,
        prefill: str,
        end_token_ids: Collection[int],
    ) -> None:
        self._reward, self._verifier, self._reader = reward, verifier, reader
        self._find_repetition, self._prefill, self._end_ids = find_repetition, prefill, frozenset(end_token_ids)

    def judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Grade]:
        """One grade for each sample, in order."""
        verdicts = self._reward.judge(pairs)
        texts = [self._reader.read(self._without_end(sample.token_ids)).text for _, sample in pairs]
        answers = [self._answer(text, verdict) for text, verdict in zip(texts, verdicts, strict=True)]
        rights = [verdict.right for verdict in verdicts]
        formless = [at for at, verdict in enumerate(verdicts) if verdict.reason in FORM and answers[at] is not None]
        if formless:
            again = self._verifier.verify([(pairs[at][0], Response("", answers[at])) for at in formless])
            for at, verdict in zip(formless, again, strict=True):
                rights[at] = verdict.right
                if not verdict.judged:
                    verdicts[at] = verdict
        return [
            Grade(
                right, verdict.reason, verdict.detail, verdict.mixed, verdict.right, answer,
                self._find_repetition(sample.token_ids) is not None, text,
            )
            for right, verdict, answer, (_, sample), text in zip(rights, verdicts, answers, pairs, texts, strict=True)
        ]  # fmt: skip

    def _answer(self, text: str, verdict: Verdict) -> str | None:
        if verdict.reason == "truncated":
            return None
        if verdict.reason in FORM:
            return final_answer(self._prefill + text)
        response = parse_response(text, self._prefill)
        return response.answer if isinstance(response, Response) else None

    def _without_end(self, token_ids: np.ndarray) -> np.ndarray:
        stop = len(token_ids)
        while stop and int(token_ids[stop - 1]) in self._end_ids:
            stop -= 1
        return token_ids[:stop]


def _choice(prompt: Prompt, answer: str) -> Verdict:
    letters = chosen_letters(answer)
    if letters is None:
        return Verdict(False, "wrong", f"{answer[:100]!r} names no option")
    right = letters == frozenset(prompt.answer)
    named = "".join(sorted(letters))
    return Verdict(right, "right" if right else "wrong", "" if right else f"{named} is not {prompt.answer}")
