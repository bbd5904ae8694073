"""The final answer of any output, multiple-choice letters, and what of the reward an evaluation takes over."""

import numpy as np
import pytest

from rollout.evaluate.grading import ChoiceRule, Grader
from rollout.reward.final_answer import chosen_letters, final_answer
from rollout.types import Prompt, Sample, Verdict


@pytest.mark.parametrize(("text", "answer"), [
    ("<think>a</think><answer> 7 </answer>", "7"),
    ("<think>a</think><answer>7</answer> and <answer>8</answer>", "8"),  # the last word counts
    ("<think>a</think><answer>7", "7"),
    ("<think><answer>6</answer></think> so \\boxed{7}", "7"),  # what stands in the thinking is no answer
    ("<think>\\boxed{6}</think> It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("<think>a</think>\n\nIt is 7.\n\nSo: 7\n", "So: 7"),
    ("<think>never closed, but \\boxed{7} then", None),  # it ended inside its thinking
    ("<think>a <answer>7</answer> then", None),
    ("<think>a</think>b<think>\\boxed{7}", None),
    ("<answer>42</answer> </think>", "42"),  # no thinking was opened
    ("<think>a <answer>42</answer> </think>", None),
    ("<answer> the <answer>42", "42"),
    ("<think>never closed", None),
    ("<think>a</think>", None),
    ("<think>a</think><answer></answer>", "<answer></answer>"),  # a line that no rule finds right
    ("No thinking at all.\nThe answer is 18.", "The answer is 18."),
    ("", None),
])  # fmt: skip
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("answer", "letters"), [
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("（B）", "B"), ("Ｂ", "B"), ("B.", "B"), ("B。", "B"), ("B. 3 cm", "B"),
    ("(B) 3 cm", "B"),
    ("B、3厘米", "B"), ("B: $3$", "B"), ("\\boxed{B}", "B"), ("\\boxed{\\text{B}}", "B"), ("$\\mathrm{B}$", "B"), ("**B**", "B"),
    ("故选：B", "B"), ("答案是 **D**。", "D"), ("选 AC", "AC"), ("the answer is (B)", "B"), ("Option C is right", "C"),
    ("答案是A，不对，答案是B", "B"), ("ACD", "ACD"), ("A、C", "AC"), ("A B D", "ABD"), ("(A)(C)", "AC"), ("A和C", "AC"),
    ("A或B", "AB"),
    ("A or B", "AB"), ("The answer is A or B", "AB"), ("A. 3 or B. 4", "AB"),  # who hedges names both
    ("The answer is B, not option A", "B"), ("A, B, C 均正确，故选D", "D"), ("B is correct", "B"), ("B项", "B"), ("B 3 cm", "B"),
    ("b) 5", "B"), ("A is wrong, option B", "B"), ("除了选项B", None), ("B. Option A would need 3", "B"), ("不选A，选B", "B"),
    ("e.g. 5", None), ("not B", None),
    ("A triangle", None), ("Because it is B", None), ("3", None), ("", None), ("72", None), ("Bob", None), ("Answer: Bob", None),
])  # fmt: skip
def test_letters(answer, letters):
    assert chosen_letters(answer) == (None if letters is None else frozenset(letters))


class Equal:
    """A rule that compares texts, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def verify(self, pairs):
        answers = [answer if isinstance(answer, str) else answer.answer for _, answer in pairs]
        self.asked += answers
        rights = [answer == prompt.answer for (prompt, _), answer in zip(pairs, answers, strict=True)]
        return [Verdict(right, "right" if right else "wrong") for right in rights]

    def close(self):
        pass


CHOICE = Prompt("c", "?", "BD", metadata={"choice": True})
PLAIN = Prompt("p", "?", "7")


def test_choices_are_compared_as_letters_and_the_rest_by_the_rule():
    rule = Equal()
    verdicts = ChoiceRule(rule).verify([(CHOICE, "(D), (B)"), (PLAIN, "7"), (CHOICE, "B"), (PLAIN, "8"), (CHOICE, "neither")])
    assert [verdict.right for verdict in verdicts] == [True, True, False, False, False]
    assert [verdict.reason for verdict in verdicts] == ["right", "right", "wrong", "wrong", "wrong"]
    assert rule.asked == ["7", "8"]
    assert verdicts[2].detail == "B is not BD"


class Text:
    """Tokens are code points; 0 ends."""

    def __init__(self, token_ids):
        self.text = "".join(map(chr, token_ids))


class Reader:
    def read(self, token_ids):
        return Text(token_ids)


class Says:
    """A reward with verdicts given beforehand."""

    def __init__(self, *verdicts):
        self.verdicts = list(verdicts)

    def judge(self, pairs):
        assert len(pairs) == len(self.verdicts)
        return list(self.verdicts)


def grades(verifier, *outputs):
    """outputs: (text, the reward's verdict, finish reason)."""
    pairs = [
        (PLAIN, Sample(np.array([*map(ord, text), 0], np.int32), np.zeros(len(text) + 1, np.float32), finish, 1))
        for text, _, finish in outputs
    ]
    repeats = lambda ids: "loops" if "haha" in "".join(map(chr, ids)) else None  # noqa: E731
    reward = Says(*(verdict for _, verdict, _ in outputs))
    return Grader(reward, verifier, Reader(), repeats, prefill="<think>\n", end_token_ids=[0]).judge(pairs)


def test_a_right_answer_in_a_wrong_form_is_right_and_not_rewarded():
    verifier = Equal()
    made = grades(
        verifier,
        ("a</think><answer>7</answer>", Verdict(True, "right", mixed=True), "stop"),
        ("a</think>So it is \\boxed{7}", Verdict(False, "format", "no_answer"), "stop"),
        ("a haha</think><answer>7</answer>", Verdict(False, "repetition"), "stop"),
        ("a</think>\\boxed{8}", Verdict(False, "format"), "stop"),
        ("a", Verdict(False, "format"), "stop"),
        ("a haha</think><answer>7</answer>", Verdict(False, "truncated"), "length"),
        ("a</think><answer>8</answer>", Verdict(False, "wrong"), "stop"),
    )
    assert [grade.right for grade in made] == [True, True, True, False, False, False, False]
    assert [grade.rewarded for grade in made] == [True, False, False, False, False, False, False]
    assert [grade.answer for grade in made] == ["7", "7", "7", "8", None, None, "8"]
    assert [grade.repetitive for grade in made] == [False, False, True, False, False, True, False]
    assert [grade.reason for grade in made] == ["right", "format", "repetition", "format", "format", "truncated", "wrong"]
    assert [grade.mixed for grade in made] == [True] + [False] * 6
    assert verifier.asked == ["7", "7", "8"], "only what the filter took out is verified again"
    assert made[1].text == "a</think>So it is \\boxed{7}", "without the end token"


class NoJudge:
    def verify(self, pairs):
        return [Verdict.unjudged("the judge is away") for _ in pairs]


def test_what_the_judge_does_not_judge_stays_unjudged():
    made = grades(
        NoJudge(),
        ("a</think><answer>7</answer>", Verdict.unjudged("the judge is away"), "stop"),
        ("a</think>7", Verdict(False, "format"), "stop"),
        ("a", Verdict(False, "truncated"), "length"),
    )
    assert [grade.judged for grade in made] == [False, False, True]
    assert not any(grade.right or grade.rewarded for grade in made)
