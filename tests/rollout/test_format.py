"""R1's format: hand-written cases with their reasons and places, and one regular expression as the oracle."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollout.reward.format import LONGEST_BLANK, FormatError, Response, parse_response

GOOD = "<think>\nt\n</think>\n<answer>\n42\n</answer>"
INNER = r"((?:(?!</?(?:think|answer)>).)*)"
ORACLE = re.compile(rf"\A\s*<think>{INNER}</think>\s*<answer>{INNER}</answer>\s*\Z", re.DOTALL)

PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<think", "word", " ", "\n", "\xa0", "<", "答", "</answer"]
)
TEXTS = st.lists(PIECES, max_size=9).map("".join)
NO_TAG = st.text(max_size=30).filter(lambda text: not re.search(rf"</?(think|answer)>|\s{{{LONGEST_BLANK}}}", text))


@pytest.mark.parametrize(
    ("text", "prefill", "expected"),
    [
        (GOOD, "", Response("t", "42")),
        ("t\n</think>\n<answer>42</answer>\n", "<think>\n", Response("t", "42")),
        ("</think><answer>42</answer>", "<think>", Response("", "42")),
        ("x < y </think> <answer> <b>4</b> </answer>", "<think>", Response("x < y", "<b>4</b>")),
    ],
)
def test_right_format(text, prefill, expected):
    assert parse_response(text, prefill) == expected


@pytest.mark.parametrize(
    ("text", "reason", "place"),
    [
        ("", "no_think", 0),
        ("The answer is 42.", "no_think", 17),
        ("<answer>42</answer>", "no_think", 19),
        ("<think>on and on", "think_not_closed", 0),
        ("a<think>on<answer>42</answer>", "think_not_closed", 1),
        ("<think>a<think>b</think><answer>42</answer>", "two_think_blocks", 8),
        ("<think>a</think><think>b</think><answer>42</answer>", "two_think_blocks", 16),
        (GOOD + "<think>more</think>", "two_think_blocks", len(GOOD)),
        ("<think>a</think> 42", "no_answer", 19),
        ("<think>a</think><answer>42", "answer_not_closed", 16),
        ("<answer>42</answer><think>a</think>", "answer_before_think", 0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", "two_answer_blocks", 34),
        ("<think>a</think><answer>1<answer>2</answer>", "two_answer_blocks", 25),
        ("<think>so <answer>1</answer></think><answer>2</answer>", "stray_tag", 10),
        ("<think>a</think></think><answer>2</answer>", "stray_tag", 16),
        ("<think>a</think><answer>2</answer></answer>", "stray_tag", 34),
        ("</think><think>a</think><answer>2</answer>", "stray_tag", 0),
        ("well <think>a</think><answer>2</answer>", "text_outside", 0),
        ("<think>a</think> so <answer>2</answer>", "text_outside", 17),
        ("<think>a</think><answer>2</answer>\n bye", "text_outside", 36),
        ("<think>a</think><answer> \n</answer>", "empty_answer", 24),
    ],
)
def test_reason_and_place(text, reason, place):
    assert parse_response(text, "") == FormatError(reason, place)


SKELETON = "{0}<think>{1}b{2}</think>{3}<answer>{4}4{5}</answer>{6}"


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("blank", ["\n", " ", "\u3000"])
def test_white_space_beside_a_tag_is_bounded(place, blank):
    """Nothing measures it, so it would be free."""
    gaps = [""] * 7
    gaps[place] = blank * LONGEST_BLANK
    assert parse_response(SKELETON.format(*gaps), "") == Response("b", "4")
    gaps[place] += blank
    text = SKELETON.format(*gaps)
    assert parse_response(text, "") == FormatError("padding", text.index(blank))


def test_white_space_is_bounded_across_the_prefill_and_in_an_empty_thinking():
    assert parse_response("\n" * LONGEST_BLANK + "t</think><answer>1</answer>", "<think>\n") == FormatError("padding", 7)
    assert parse_response("\n" * 4000 + "</think><answer>1</answer>", "<think>") == FormatError("padding", 7)
    # Within the thinking, its tokens are measured.
    assert isinstance(parse_response("a" + "\n" * 4000 + "b</think><answer>1</answer>", "<think>"), Response)


def test_a_repeated_prefill_is_a_second_block():
    assert parse_response("<think>t</think><answer>1</answer>", "<think>\n") == FormatError("two_think_blocks", 8)


@given(TEXTS, TEXTS)
@example(GOOD, "")
@example("t</think><answer>1</answer>", "<think>")
def test_agrees_with_one_regular_expression(text, prefill):
    judged = prefill + text
    found, parsed = ORACLE.match(judged), parse_response(text, prefill)
    if found and found.group(2).strip():
        assert parsed == Response(found.group(1).strip(), found.group(2).strip())
    else:
        assert isinstance(parsed, FormatError)
        assert 0 <= parsed.place <= len(judged)


@given(NO_TAG, NO_TAG.filter(str.strip), st.integers(0, 8))
def test_what_is_written_is_read(thinking, answer, cut):
    """However the text is divided between prefill and response."""
    judged = f"<think>{thinking}</think>\n<answer>{answer}</answer>"
    assert parse_response(judged[cut:], judged[:cut]) == Response(thinking.strip(), answer.strip())
