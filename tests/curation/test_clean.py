"""What is mended, flagged and turned away; and above all what is left alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.clean import clean, has_subquestions

PIECES = st.lists(
    st.sampled_from(
        [
            "&lt;",
            "&amp;lt;",
            "<p>",
            "</p>",
            "<br/>",
            "<b>x</b>",
            "a<b",
            "$",
            "{",
            "}",
            "\\left(",
            "\\right)",
            "\\\\frac",
            "\f",
            "rac",
            "\t",
            "imes",
            "答案：",
            "【答案】",
            "Answer: 7",
            "(1) 求a；",
            "（2）求b。",
            "____7____",
            "求和",
            "1. ",
            "(5分)",
            "\u200b",
            "Ã©",
            "浣犲ソ",
            "\n\n\n",
            "<sub>2</sub>",
            " ",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(PIECES, st.text(max_size=60)))
def test_a_clean_text_is_clean(text: str) -> None:
    once = clean(text, "7")
    again = clean(once.question, once.answer)
    assert (again.question, again.answer) == (once.question, once.answer)


@pytest.mark.parametrize(
    ("noisy", "mended"),
    [
        ("Compute \frac{1}{2} \times 3.", r"Compute \frac{1}{2} \times 3."),
        ("求$\x08ar{z}$的值", r"求$\bar{z}$的值"),
        ("Find $\\\\frac{1}{2}$.", r"Find $\frac{1}{2}$."),
        ("Find $\\frac{1}{2$ now.", r"Find $\frac{1}{2}$ now."),
        ("if x &lt; 3 &amp; y", "if x < 3 & y"),
        ("<p>Find x</p><br/>now", "Find x\n\nnow"),
        ("H<sub>2</sub>O and x<sup>10</sup>", "H_{2}O and x^{10}"),
        ("a <b>bold</b> word", "a bold word"),
        ("cafÃ© has 3 tables", "café has 3 tables"),
        ("你好世界".encode().decode("gb18030", "ignore") + "", "你好世界"),
        ("x\u200b + \xa0y", "x +  y"),
        ("13. (5 分) 圆心在原点的圆", "圆心在原点的圆"),
        ("（本小题满分12分）已知函数求值", "已知函数求值"),
        ("已知函数求最大值【答案】7【解析】略", "已知函数求最大值"),
        ("How many are left? Answer: 7", "How many are left?"),
        ("共有 ____7____ 个苹果", "共有 ____ 个苹果"),
    ],
)
def test_mended(noisy: str, mended: str) -> None:
    found = clean(noisy, "7")
    assert (found.question, found.reject) == (mended, "")


@pytest.mark.parametrize(
    "text",
    [
        "If a<b and c>d, find a+c.",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix} and \\text",
        "3. 5 is a number in English text",
        "14.4 名同学参加活动",
        "A solution: what is the concentration of salt if 7 g are in it?",
        "The answer is not here, find it.",
        "Tom & Jerry have $12 and $15.",
        "<x, y> is a vector",
        "Read tab\tseparated values",
        r"Let $f\left(x\right)=1$ and $A \leftarrow B$.",
        "小明的答案是多少？",
        "价格 3 < 5 元",
    ],
)
def test_left_alone(text: str) -> None:
    found = clean(text, "7")
    assert (found.question, found.flags, found.reject) == (text, (), "")


def test_the_answer_behind_a_heading_goes_only_if_it_is_the_answer() -> None:
    assert clean("How many are left? Answer: 7 apples", "7").question == "How many are left?"
    assert clean("State the rule. Answer: in words", "7").question == "State the rule. Answer: in words"
    assert clean("从下列选项中选出正确的 ( B )", "B").question == "从下列选项中选出正确的 ( )"
    assert clean("设点 ( B )", "A").question == "设点 ( B )"


@pytest.mark.parametrize(
    "text", ["x 锟斤拷 y", "lost \ufffd here", "see ![pic](a.png)", 'look <img src="a.png"/> here', "<p></p>"]
)
def test_turned_away(text: str) -> None:
    assert clean(text, "7").reject


def test_broken_latex_is_flagged_but_a_pair_is_not() -> None:
    assert clean(r"$\left( x $ and }", "1").flags == ("broken_latex",)
    assert clean(r"$\{ x \}$", "1").flags == ()


@pytest.mark.parametrize(
    "text",
    [
        "已知f(x)。\n(1) 求f(1)；\n(2) 求f(2)的值。",
        "Let x=1. (a) Find y. (b) Find z.",
        "（1）求a的值；（2）证明b>0。",
        "Given: ① 求 a ；② 求 b ？",
    ],
)
def test_subquestions(text: str) -> None:
    assert has_subquestions(text)
    assert "subquestions" in clean(text, "1").flags


@pytest.mark.parametrize(
    "text",
    [
        "Points (1) and (2) are far; find the distance.",
        "f(1)=2, f(2)=3, find f(3)",
        "已知条件：①a>0；②b>0。求a+b",
        "(2) 求b的值",
        "Find x. (b) is next.",
    ],
)
def test_no_subquestions(text: str) -> None:
    assert not has_subquestions(text)
