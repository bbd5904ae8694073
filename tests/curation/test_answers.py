"""The ground truth out of an answer field."""

import math
import time
from fractions import Fraction

import pytest

from curation import answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1", None),
        ("no", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert answers.last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("((3)/(4))", r"\frac{3}{4}"),
        ("(3)/(2)", r"\frac{3}{2}"),
        ("1((1)/(2))", r"\frac{3}{2}"),
        ("12.5%", "12.5%"),
        ("7", "7"),
        ("3/4", "3/4"),
    ],
)
def test_sheet_fraction(text: str, expected: str) -> None:
    assert answers.sheet_fraction(text) == expected


@pytest.mark.parametrize("text", [None, "", "  ", "N/A", "none", "略", "答案见解析。", "NotFound", "无", "?"])
def test_placeholders(text: str | None) -> None:
    assert answers.is_placeholder(text)


@pytest.mark.parametrize("text", ["0", "no solution", "x", "A", "无解", "proof", r"\emptyset", "false"])
def test_no_placeholders(text: str) -> None:
    assert not answers.is_placeholder(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("1,000", 1000),
        ("-3.5", Fraction(-7, 2)),
        ("3/4", Fraction(3, 4)),
        (r"$-\frac{1}{2}$", Fraction(-1, 2)),
        (r"\$18", 18),
        (".5", Fraction(1, 2)),
    ],
)
def test_as_number(text: str, value: Fraction) -> None:
    assert answers.as_number(text) == value


@pytest.mark.parametrize("text", ["50%", "5 cm", "1,5", "x", "1/0", r"\frac{1}{0}", "1e5", "", "9" * 100])
def test_no_number(text: str) -> None:
    assert answers.as_number(text) is None
    assert math.isnan(answers.as_value(text))


def test_a_text_that_opens_boxes_without_end_takes_no_time():
    start = time.perf_counter()
    assert answers.last_boxed("\\boxed{" * 20_000) is None
    assert answers.last_boxed("\\boxed{" * 20_000 + "7}") == "7"
    assert time.perf_counter() - start < 1.0
