"""Stage two of the reward, by rule or by a judge: who decides on which prompt, and both at once.

A prompt whose `metadata` says "judge": true (curation marks those with several sub-questions or an answer in words) is the
judge's, every other the rule's. Where the run has no judge, such a prompt stays unjudged: the rule would be wrong in silence.
"""

from __future__ import annotations

from typing import Protocol

from rollout.reward.format import Response
from rollout.types import Prompt, Verdict


class Rule(Protocol):
    """`rollout.reward.rule.RuleVerifier` is one."""

    def verify(self, pairs: list[tuple[Prompt, str]]) -> list[Verdict]: ...

    def close(self) -> None: ...


class Pending(Protocol):
    def result(self) -> list[Verdict]: ...


class Judge(Protocol):
    """`rollout.reward.judge.verifier.JudgeVerifier` is one."""

    def start(self, pairs: list[tuple[Prompt, Response]]) -> Pending:
        """Returns at once; the verdicts, in order, are the result of what it returns."""
        ...

    def close(self) -> None: ...


def needs_judge(prompt: Prompt) -> bool:
    return prompt.metadata.get("judge") is True


class Correctness:
    """`rollout.reward.pipeline.Verifier` over a rule and, where there is one, a judge. A context manager; `close` ends both."""

    def __init__(self, rule: Rule, judge: Judge | None = None) -> None:
        self._rule, self._judge = rule, judge

    def verify(self, pairs: list[tuple[Prompt, Response]]) -> list[Verdict]:
        """One verdict for each (prompt, response), in order. The judge works while the rule does."""
        for_judge = [place for place, (prompt, _) in enumerate(pairs) if needs_judge(prompt)]
        for_rule = [place for place, (prompt, _) in enumerate(pairs) if not needs_judge(prompt)]
        verdicts: dict[int, Verdict] = {}
        pending: Pending | None = None
        if for_judge and self._judge is not None:
            pending = self._judge.start([pairs[place] for place in for_judge])
        if for_rule:
            answers = [(pairs[place][0], pairs[place][1].answer) for place in for_rule]
            verdicts |= dict(zip(for_rule, self._rule.verify(answers), strict=True))
        if pending is not None:
            verdicts |= dict(zip(for_judge, pending.result(), strict=True))
        else:
            verdicts |= {place: Verdict.unjudged("the prompt is for a judge, and there is none") for place in for_judge}
        return [verdicts[place] for place in range(len(pairs))]

    def close(self) -> None:
        try:
            if self._judge is not None:
                self._judge.close()
        finally:
            self._rule.close()

    def __enter__(self) -> Correctness:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
