"""The share of each script outside formulas, what is foreign to the question, and what counts as mixed."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_outputs import outputs

from rollout.reward.languages import Languages, _prose, measure_languages, mixes_languages

ENGLISH, CHINESE = "How many eggs does Janet sell?", "小明有多少个苹果？"


def shares(text: str, question: str = "") -> dict[str, float]:
    return {script: round(share, 3) for script, share in measure_languages(text, question).shares.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("12 + 34 = 46. 【】，。", {}),
        ("eggs and 鸡蛋", {"latin": 0.778, "han": 0.222}),
        ("x, AB, cm 和 π", {"han": 1.0}),
        ("ℵ ℝ 𝑥 and", {"latin": 1.0}),
        ("ＥＧＧＳ ４２ 鸡", {"latin": 0.8, "han": 0.2}),
        ("Ивáн говорит", {"cyrillic": 1.0}),
        ("日本語のテスト", {"han": 0.429, "kana": 0.571}),
        ("한국어 ไทย עברית العربية हिन्दी λόγος",
         {"arabic": 0.241, "devanagari": 0.207, "hebrew": 0.172, "greek": 0.172, "hangul": 0.103, "thai": 0.103}),
        # Formulas, code and markup are left out.
        (r"共 $\text{apples}$ \(apples\) \[apples\] $$apples$$ \frac 个", {"han": 1.0}),
        (r"\begin{align*} apples \end{align*} 个", {"han": 1.0}),
        ("```python\nprint(apples)\n``` 和 `apples` 个", {"han": 1.0}),
        ("<think>个</think><answer>个</answer><|im_end|> https://example.org/apples", {"han": 1.0}),
        ("it cost $5 and then 花 $7", {"latin": 0.917, "han": 0.083}),  # two prices are no formula
        ("unclosed $apples 和", {"latin": 0.933, "han": 0.067}),
    ],
)  # fmt: skip
def test_shares_outside_formulas(text, expected):
    assert shares(text) == expected


@pytest.mark.parametrize(
    ("text", "question", "mixed"),
    [
        ("She sells nine eggs.", ENGLISH, False),
        ("She sells nine 鸡蛋.", ENGLISH, True),
        ("她卖九个鸡蛋。", ENGLISH, True),
        ("她卖九个鸡蛋。", CHINESE, False),
        ("她卖九个鸡蛋。", "", False),
        ("因此 $x=3$ cm，选 AB。", CHINESE, False),
        ("因此 the answer is 三。", CHINESE, True),
        ("小明 Janet 卖鸡蛋。", CHINESE * 8 + " Janet", False),  # the question's own word
        ("小明 Janet 卖鸡蛋。", CHINESE * 8, True),
        ("Sets of size ℵ and ℶ.", ENGLISH, False),
        ("Nine eggs, да да.", ENGLISH, True),
        ("Nine eggs, да да.", ENGLISH * 8 + " да", False),
        ("Nine eggs. " + "да " * 10, ENGLISH * 8 + " да", False),
        ("Therefore 旧 it is over.", ENGLISH, False),  # one stray letter
        ("Nine eggs. " * 40 + "鸡蛋", ENGLISH, False),  # two letters of 280
        ("Nine eggs. " * 20 + "鸡蛋", ENGLISH, True),  # two of 142
        ("Nine eggs. " * 4000 + "鸡" * 19, ENGLISH, False),
        ("Nine eggs. " * 4000 + "鸡" * 20, ENGLISH, True),  # a clause, however long the rest
        ("Ответ ясен: девять.", ENGLISH, True),
        ("Use α, β and π.", ENGLISH, False),
        ("Nine eggs 和 鸡蛋", "How many eggs, 多少鸡蛋？", False),  # a question in two scripts
    ],
)
def test_what_is_mixed(text, question, mixed):
    assert measure_languages(text, question).mixed is mixed
    assert mixes_languages(text, question) is mixed


def test_the_limits_of_mixed():
    assert [Languages({}, share, letters).mixed for share, letters in ((1, 1), (0.01, 2), (0.0099, 2), (0.0099, 20))] == [
        False,
        True,
        False,
        True,
    ]


PIECES = st.sampled_from(
    ["egg ", "Eggs", "鸡", "蛋蛋", "$鸡$", "π", "λόγος ", "µ", "Ａ", "é", "è", "да", "ℝ", "ⁿ", "가", "𝑥", "`鸡`", "，"]
)


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=30).map("".join), st.sampled_from(["", ENGLISH, CHINESE, "egg 鸡", "λόγος about eggs", "12"]))
def test_the_fast_form_agrees(text, question):
    assert mixes_languages(text, question) == measure_languages(text, question).mixed


ORACLE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|\$\$.+?\$\$|\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[A-Za-z]+|</?(?:think|answer)>|<\|[^|>\s]*\|>|https?://\S+|[\u2100-\u214f]",
    re.DOTALL,
)
"""The same as one expression, which looks for a missing closer anew at each opener."""
MARKUP = st.sampled_from(
    [
        *[
            r"\(",
            r"\)",
            r"\[",
            r"\]",
            r"\begin{a}",
            r"\end{a}",
            r"\begin{b*}",
            r"\end{b*}",
            r"\begin{",
            "\\",
            "$",
            "$$",
            "`",
            "```",
        ],
        *["\n", " ", "x", "9", "(", ")", "</think>", "<|", "|>", "https://"],
    ]
)


@settings(max_examples=1000)
@given(st.lists(MARKUP, max_size=25).map("".join))
def test_prose_is_what_one_expression_leaves(text):
    assert _prose(text) == ORACLE.sub(" ", text)


LOOPS = [r"\( ", r"\[ ", r"\begin{a} ", r"\begin{a}\end{b}", r"\(x\] ", r"\[x\) ", r"\begin{", "\\", "\\(\\", "$ ", "$x", "$$"]
LOOPS += ["`", "` ", "```", "<|", "<|a", "<answer>", "https://", "a", "π ", "鸡", "ℵ", " ", "\n"]


@pytest.mark.parametrize("question", [ENGLISH, CHINESE])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_16k_tokens_takes_no_time(loop, question):
    """It is measured in the trainer's process, before the sample is known to be truncated. 60,000 characters: milliseconds."""
    text = "鸡蛋 eggs " + loop * (60_000 // len(loop))
    start = time.process_time()
    mixes_languages(text, question)
    assert time.process_time() - start < 0.5


def test_openers_of_ever_new_names_take_no_time():
    text = "".join(rf"\begin{{a{number}}}" for number in range(5_000))
    start = time.process_time()
    mixes_languages(text, CHINESE)
    assert time.process_time() - start < 0.5


@given(st.text(max_size=60))
def test_shares_add_up(text):
    found = measure_languages(text)
    assert not found.shares or abs(sum(found.shares.values()) - 1) < 1e-9
    assert 0 <= found.foreign <= 1
    assert found.mixed == mixes_languages(text, "")


def test_a_fifth_of_the_real_rollouts_mixes_languages():
    rollouts = [part for part in outputs() if part.source == "gspo-r1distill15b"]
    assert len(rollouts) == 3676
    assert 0.19 < sum(measure_languages(part.text, ENGLISH).mixed for part in rollouts) / len(rollouts) < 0.23


def test_what_others_wrote_in_english_is_not_mixed():
    """But for three outputs of math-cot-100, which are words of all languages in a row."""
    mixed = [part.key for part in outputs() if part.source != "gspo-r1distill15b" and mixes_languages(part.text, part.question)]
    assert mixed == [("math-cot-100", f"{row}", "all") for row in ("25.1", "45.5", "48.3")]
