"""The rules by which a worker scores an answer. RULES is the one place that names them: configurations and command lines accept
its keys. A scorer bounds no time and catches nothing: `rollout.reward.rule_worker` does both.

reasoning-gym executes some answers as Python: code is refused before (`rollout.reward.puzzle_answers`), and an answer that is
more than plain numbers is scored in a process of its own, so that nothing it does there could reach another's verdict.

Each worker and each configuration imports this file: nothing heavy is imported here, and a package when its rule is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollout.reward.puzzle_answers import UNSCORABLE, exact, misuse, refusal

Score = tuple[bool, str, str]
"""(right, reason, detail) of `rollout.types.Verdict`, as plain values that pickle small."""


@dataclass(frozen=True, slots=True)
class Rule:
    score: Callable[[str, str, dict[str, Any]], Score]
    """Of (ground truth, answer, entry). The reason is right or wrong, or error where the ground truth is unreadable."""
    package: str | None = None
    """That it needs, which is also the name of its distribution on PyPI (with - for _)."""
    by_entry: bool = False
    """Whether it looks at the entry: the prompt as reasoning-gym's dict, with its metadata; else {}."""
    shares: Callable[[str], bool] = lambda answer: True  # noqa: ARG005
    """Whether this answer may be scored in a process that scores others too."""
    warm_up: tuple[str, ...] = ()
    """Answers scored before the clock runs: at first use modules are loaded and a parser may learn its tables, and what is there
    before a fork, each fork has."""


def math_verify(gold: str, answer: str, _entry: dict[str, Any]) -> Score:
    if gold.strip() == answer.strip():
        return True, "right", "the same text"
    from rollout.reward.answers.formulas import equal
    from rollout.reward.answers.match import match
    from rollout.reward.answers.prose import is_empty, same_prose

    same = match(gold, answer, equal)
    if same is None:
        same = same_prose(gold, answer, equal)
    if same:
        return True, "right", ""
    if is_empty(gold):
        return False, "error", f"nothing can be read in the ground truth {gold[:100]!r}"
    return False, "wrong", f"{answer[:100]!r} is not {gold[:100]!r}"


def reasoning_gym(gold: str, answer: str, entry: dict[str, Any]) -> Score:
    from reasoning_gym import get_score_answer_fn

    puzzle = entry["metadata"]["source_dataset"]
    if why := UNSCORABLE.get(puzzle):
        return False, "error", f"{puzzle} cannot be scored: {why}"
    score_answer = get_score_answer_fn(puzzle)
    if why := refusal(puzzle, answer, gold) or misuse(puzzle, answer, entry["metadata"]):
        return False, "wrong", f"not scored: {why}"
    value = float(score_answer(answer=answer, entry=entry))
    right = value >= 1.0 - 1e-9
    if right and not exact(puzzle, answer, gold, entry["metadata"]):
        return False, "wrong", "the scorer takes it, and it is not the answer"
    return right, "right" if right else "wrong", f"score {value:g}"


def only_numbers(answer: str) -> bool:
    """Whether it executes to nothing but numbers."""
    return re.fullmatch(r"[\d\s.,/+-]*", answer) is not None


RULES: dict[str, Rule] = {
    "math-verify": Rule(
        math_verify,
        package="math_verify",
        warm_up=(r"\frac{\sqrt{2}x_{1}+1}{2}", r"x^{2}-2x+1=0", r"(1,2)\cup[3,\infty)", r"\sin x+2\pi e^{-t}", "a<b"),
    ),
    "reasoning-gym": Rule(reasoning_gym, package="reasoning_gym", by_entry=True, shares=only_numbers),
}
