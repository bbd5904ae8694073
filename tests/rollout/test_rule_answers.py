r"""What counts as the same answer, class by class, each with pairs that must match and pairs that must not.

Every pair of answer_pairs.tsv is judged in a worker, math-verify included. They are written by hand; none is from the files on
which the verifier was measured (`benchmarks.verifier`).
"""

import csv
from fractions import Fraction
from pathlib import Path

import pytest

from rollout.reward.answers.match import match
from rollout.reward.answers.numbers import number
from rollout.reward.answers.read import Group, read
from rollout.reward.answers.text import clean, unwrap
from rollout.reward.answers.units import split_unit
from rollout.reward.rule import RuleVerifier
from rollout.types import Prompt

PAIRS = list(
    csv.DictReader((Path(__file__).parent / "answer_pairs.tsv").open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
)


@pytest.fixture(scope="module")
def verifier():
    with RuleVerifier("math-verify", workers=2, timeout_seconds=60.0) as shared:
        yield shared


@pytest.mark.parametrize("kind", sorted({pair["class"] for pair in PAIRS}))
def test_pairs(verifier, kind):
    pairs = [pair for pair in PAIRS if pair["class"] == kind]
    assert {pair["verdict"] for pair in pairs} == {"right", "wrong"}, "a class without a counterexample shows nothing"
    verdicts = verifier.verify([(Prompt("p", "q", pair["gold"]), pair["answer"]) for pair in pairs])
    assert not [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reason != pair["verdict"]]


def test_numbers_beyond_what_python_converts(verifier):
    """int() refuses more than 4,300 digits."""
    long = "9" * 5000
    verdicts = verifier.verify([(Prompt("p", "q", long), long), (Prompt("p", "q", long), long[1:])])
    assert [verdict.right for verdict in verdicts] == [True, False]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3.5", Fraction(-7, 2)),
        ("1,234,567", Fraction(1234567)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("14(1/2)", Fraction(29, 2)),
        ("-2 1/3", Fraction(-7, 3)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"0.\dot{1}4\dot{2}", Fraction(142, 999)),
        ("1.5e-3", Fraction(3, 2000)),
        ("一千零一", Fraction(1001)),
        ("一亿零五百", Fraction(100000500)),
        ("二又三分之一", Fraction(7, 3)),
        ("负十二点五", Fraction(-25, 2)),
        ("2万", Fraction(20000)),
        ("1A_{16}", Fraction(26)),
        ("1,5", None),
        ("1.2.3", None),
        ("e5", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("1/0", None),
        ("三角形", None),
    ],
)
def test_numbers_are_exact(text, value):
    found = number(text)
    assert (found and found.value) == value


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5 cm", "5", "cm"),
        (r"5\text{ cm}^2", "5", "cm^2"),
        ("60 km/h", "60", "h^-1 km"),
        (r"9.8\text{m}/\text{s}^2", "9.8", "m s^-2"),
        (r"\$18", "18", "dollar"),
        ("36 square metres", "36", "m^2"),
        ("2t", "2", "t"),
        ("2x", "2x", ""),
        (r"x\text{ m}", "x", "m"),
        ("3 sin", "3 sin", ""),
        ("m", "m", ""),
        (r"\frac{1}{I}T", r"\frac{1}{I}T", ""),
        ("5%", "5", "%"),
    ],
)
def test_units_are_split_off(text, value, unit):
    found = split_unit(text)
    assert found[:2] == (value, unit)
    assert found[2] == (text != "2t"), "only a letter that touches its number may be a variable"


def test_spelling_is_unified():
    assert clean(r"\left( \dfrac{1}{2} ,\, \sqrt 3 \right)") == r"( \frac{1}{2} , \sqrt{3} )"
    assert clean("（１，２］") == "(1,2]"
    assert clean(r"2\mathrm{i}") == "2i"
    assert clean(r"10\,\!080") == "10 080"  # two separators in one gap are layout of something else


def test_only_one_statement_is_unwrapped():
    assert unwrap(r"so $x=5$.") == "x=5"
    assert unwrap(r"\boxed{1} and \boxed{2}") == "1 , 2"
    assert unwrap(r"from $x=1$ we get that $y$ must be $2$") is None


def test_structure():
    (blanks,) = read("3；(1,2)")
    assert isinstance(blanks, Group)
    assert blanks.brackets == ";"
    assert isinstance(blanks.parts[1], Group)
    assert blanks.parts[1].brackets == "()"
    (interval,) = read(r"x \ge 2")
    assert (interval.brackets, interval.name) == ("[)", "x")
    decimal, listed = read("1,22")
    assert (decimal.number.value, len(listed.parts)) == (Fraction(61, 50), 2)
    assert read("so 5 gives 7 and nothing else comes of it") == ()


def test_the_library_is_asked_about_single_formulas_only():
    asked = []
    assert match(
        r"x+1, 2, (y, 3)",
        r"2, 1+x, (y, 3)",
        lambda gold, answer: asked.append((gold, answer)) or {gold, answer} == {"x+1", "1+x"},
    )
    assert all("," not in text for pair in asked for text in pair)
