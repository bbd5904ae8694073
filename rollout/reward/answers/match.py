"""Do two readings say the same? Structure is compared here, numbers exactly, other formulas by the function that is given.

For what texts leave open, in favour of rejecting:
- two different units never match; a missing one, or a word that is no unit, matches any;
- a bare number is a percentage of the same number (17.5 for 17.5%) or the share (0.175), but a number that is at most 1 is the
  share only: 0.5% is not 0.5;
- a list is in any order, but in the order given where its names differ and the other side has none, and beside a point;
- a set is no point, and an interval has the same brackets;
- an answer may name a part twice, if the ground truth names none twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from rollout.reward.answers.numbers import same_number
from rollout.reward.answers.phrases import DENIES, HEDGES, is_noun
from rollout.reward.answers.read import Group, Node, Value, read, split, words

Equal = Callable[[str, str], bool]
"""Is the answer's LaTeX formula (second) equal to the ground truth's (first)?"""

_CHOICE_MARKUP = re.compile(r"\\text(?:bf|rm|it)?\{([^{}]*)\}|\\boxed\{|[$*]|\\[()\[\]]|\\mathbf\{")
_OPTION = re.compile(r"(?<![A-Za-z])([A-H])(?![A-Za-z'])(?!(?<=A)\s+(?!is\b|are\b|and\b|but\b|to\b)[a-z])")
"""A bare letter; an A before a word is the article."""
_STATED_FIRST = re.compile(
    r"(?:(?i:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is)?)|故?选|答案[是为]?|选项)?\s*[:：]?\s*\(?([A-H])\)?\s*[.:)：．]"
)
_STATED_LAST = re.compile(
    r"(?:.*\b(?:answer|option|choice)\s*(?:is)?|.*选(?:项[是为]?|择)?|.*答案[是为]?)\s*[:：]?\s*\(?([A-H])\)?[\s.。}]*",
    re.IGNORECASE | re.DOTALL,
)
_STATED_CORRECT = re.compile(
    r"(?i:(?:the\s+)?(?:answer|option|choice)\s+)?\(?([A-H])\)?(?:\s*(?:选?项|是)?\s*正确的?|"
    r"\s+is\s+(?:the\s+)?(?:correct|right)(?:\s+(?:answer|option|choice|one))?)[\s.。]*"
)
_STATED_SEVERAL = re.compile(
    r"(?i:(?:(?:so|thus|hence|therefore)[\s,]*)?(?:the\s+)?(?:correct\s+)?(?:answers?|options?|choices?)(?:\s+(?:is|are))?)"
    r"\s*[:：]?\s*(?P<english>\(?[A-H].*)|"
    r"(?:故|所以|因此)?[,，]?\s*(?:应?选|(?:正确的?)?答案应?[是为]?)\s*[:：]?\s*(?P<chinese>\(?[A-H].*)"
)
_SHARES = {"%": 100, "permil": 1000}
_OPERATORS = (
    ("sum", r"\\sum(?![a-zA-Z])|∑"),
    ("product", r"\\prod(?![a-zA-Z])|∏"),
    ("integral", r"\\(?:i*int|oint)(?![a-zA-Z])|∫"),
    ("remainder", r"\\[bp]?mod(?![a-zA-Z])"),
    ("limit", r"\\lim(?:sup|inf)?(?![a-zA-Z])"),
    ("floor", r"\\[lr]floor(?![a-zA-Z])|[⌊⌋]"),
    ("ceiling", r"\\[lr]ceil(?![a-zA-Z])|[⌈⌉]"),
    ("determinant", r"\\begin\{[vV]matrix\}"),
    (
        "derivative",
        r"\\frac\s*(?:\{\s*(?:d|\\partial)(?:[^{}]|\{[^{}]*\})*\}|d|\\partial)\s*\{\s*(?:d|\\partial)\s*\\?[a-zA-Z]|"
        r"(?<![a-zA-Z])d\s*/\s*d[a-z]",
    ),
    *(
        (name, rf"(?<!_)(?<!_\{{)(?:\\{name}(?![a-zA-Z])|\\text\{{\s*{name}\s*\}}|(?<![a-zA-Z\\{{]){name}\s*(?:\(|\\\{{))")
        for name in ("gcd", "lcm", "max", "min", "sup", "inf", "det", "floor", "ceil", "norm", "rank", "trace")
    ),
)
_CALCULATES = tuple((name, re.compile(pattern)) for name, pattern in _OPERATORS)
"""Operations that are still to be done; x_{\\max} is a name."""
_GREEK = (
    "(?:var)?(?:alpha|beta|[gG]amma|[dD]elta|epsilon|zeta|eta|[tT]heta|kappa|[lL]ambda|mu|nu|[xX]i|rho|[sS]igma|tau|[pP]hi|chi|[pP]si|"
    "[oO]mega)"
)
_NO_VARIABLE = re.compile(rf"\\text\{{[^{{}}]*\}}|\\(?:begin|end)\{{\w+\}}|\\(?!(?:{_GREEK})(?![a-zA-Z]))[a-zA-Z]+")
_VARIABLE = re.compile("[a-df-hj-zA-Z]")
"""e and i are numbers."""
_APART = re.compile(r"(?<!\\frac\s)(?<!\\binom\s)(?<![\d_])\d+\.?\s+\d+(?!\d*\s*/)")
"""10 24: two numbers, which the library joins."""
_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc|arc|sinh|cosh|log|ln|lg|exp|sqrt)")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_LETTERS = re.compile(r"[A-Za-z]{4,}|[\u4e00-\u9fff]+")


def same(gold: Node, answer: Node, equal: Equal) -> bool:
    """gold and answer say the same thing. equal is asked about single formulas only."""
    if gold.name and answer.name and not _same_name(gold.name, answer.name):
        return _rearranged(gold, answer, equal)
    if isinstance(gold, Value) and isinstance(answer, Value):
        return _same_value(gold, answer, equal)
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _same_group(gold, answer, equal)
    if _is_relation(gold.whole) or _is_relation(answer.whole):
        return equal(gold.whole, answer.whole)
    group = gold if isinstance(gold, Group) else answer
    if group.brackets in ("", "or", "{}") and group.parts:
        if group is gold and len(group.parts) > 1:
            return False
        return all(same(gold if group is answer else part, part if group is answer else answer, equal) for part in group.parts)
    return False


def _same_name(gold: str, answer: str) -> bool:
    return gold.casefold() == answer.casefold()


def _is_relation(text: str) -> bool:
    return bool(re.search(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|mathbb)(?![a-zA-Z])", text))


def _rearranged(gold: Node, answer: Node, equal: Equal) -> bool:
    """Equations that are solved for different things."""
    if isinstance(gold, Value) and isinstance(answer, Value) and _is_solved(gold) and not _is_solved(answer):
        return False
    return "=" in gold.whole and "=" in answer.whole and equal(gold.whole, answer.whole)


def _is_solved(value: Value) -> bool:
    """A name and what it is, without a variable: x = 3, and no y = 2x."""
    return bool(value.name) and not value.product and not _has_variable(value.text)


def _has_variable(text: str) -> bool:
    return _VARIABLE.search(_NO_VARIABLE.sub(" ", text)) is not None


def _turned_round(gold: Value, answer: Value) -> bool:
    r"""60^\circ = \angle A: what gold names stands alone on the right."""
    sides = split(answer.text, "=")
    return re.sub(r"[\s{}]|\\text", "", sides[-1]) == gold.name and not any(map(_has_variable, sides[:-1]))


def _same_group(gold: Group, answer: Group, equal: Equal) -> bool:
    lists = ("", "or", "{}")
    if gold.brackets == ";" or answer.brackets == ";":
        return gold.brackets in (";", *lists) and answer.brackets in (";", *lists) and _in_order(gold, answer, equal)
    if gold.brackets in lists and answer.brackets in lists:
        if _ordered(gold, answer):
            return _in_order(gold, answer, equal)
        return _in_any_order(gold, answer, equal)
    if (sorted_up := _by_names(gold, answer)) is not None:
        return sorted_up[0].brackets in ("()", *lists) and _in_order(*sorted_up, equal)
    if gold.brackets in lists or answer.brackets in lists:
        other = gold.brackets if gold.brackets not in lists else answer.brackets
        listed = gold.brackets if gold.brackets in lists else answer.brackets
        return other == "()" and listed == "" and _in_order(gold, answer, equal)
    return gold.brackets == answer.brackets and _in_order(gold, answer, equal)


def _by_names(gold: Group, answer: Group) -> tuple[Group, Group] | None:
    """A point beside named parts, which take the order of the point's names, or that of the alphabet."""
    for point, named in ((gold, answer), (answer, gold)):
        names = [part.name for part in named.parts]
        if point.brackets != "()" or named.brackets != "" or not all(names) or len(set(names)) != len(names):
            continue
        wanted = re.findall(r"\\?[a-zA-Z]+(?:_\w+)?", point.name) or sorted(names)
        if sorted(wanted) != sorted(names):
            return Group("none", ()), Group("none", ())
        placed = Group("", tuple(replace(named.parts[names.index(name)], name="") for name in wanted))
        point = replace(point, brackets="")
        return (point, placed) if named is answer else (placed, point)
    return None


def _ordered(gold: Group, answer: Group) -> bool:
    """Names that differ say whose each part is; without names on the other side only the order does."""
    sides = [[part.name for part in side.parts] for side in (gold, answer)]
    return any(all(own) and len(set(own)) == len(own) > 1 and not any(other) for own, other in (sides, sides[::-1]))


def _in_order(gold: Group, answer: Group, equal: Equal) -> bool:
    return len(gold.parts) == len(answer.parts) and all(
        same(left, right, equal) for left, right in zip(gold.parts, answer.parts, strict=True)
    )


def _in_any_order(gold: Group, answer: Group, equal: Equal) -> bool:
    """Each part of the answer is one of the gold's, and none is missing."""
    if len(answer.parts) < len(gold.parts):
        return False
    open_parts, used = list(gold.parts), []
    for part in answer.parts:
        place = next((index for index, gold_part in enumerate(open_parts) if same(gold_part, part, equal)), None)
        if place is not None:
            used.append(open_parts.pop(place))
        elif not any(same(gold_part, part, equal) for gold_part in used):
            return False
    if open_parts:
        return False
    doubled = len(answer.parts) > len(gold.parts)
    return not doubled or not any(
        same(left, right, equal) for index, left in enumerate(gold.parts) for right in gold.parts[index + 1 :]
    )


def _same_value(gold: Value, answer: Value, equal: Equal) -> bool:
    if not gold.name and not answer.name and "=" in gold.text and "=" in answer.text:
        return gold.text == answer.text or equal(gold.text, answer.text)
    if _is_solved(gold) and not answer.name and "=" in answer.text and not _turned_round(gold, answer):
        return False  # an equation that is still to be solved, as the question's
    if (gold.name and not answer.name and "=" in answer.text) or (answer.name and not gold.name and "=" in gold.text):
        return equal(gold.whole, answer.whole)
    if gold.unit == answer.unit == "" and (sides := _equated(gold, answer)) is not None:
        return bool(sides) and _unnamed_equal(*sides, equal)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return _degrees(gold, answer, equal)
    if gold.unit == answer.unit:
        return _same_text(gold, answer, equal)
    if gold.unit in _SHARES or answer.unit in _SHARES:
        return _percent(gold, answer, equal)
    if gold.product or (answer.product and not answer.spaced):
        return _unnamed_equal(gold.whole, answer.whole, equal)
    return _same_text(gold, answer, equal) or _degrees(gold, answer, equal)


def _degrees(gold: Value, answer: Value, equal: Equal) -> bool:
    """90° is π/2."""
    for degrees, other in ((gold, answer), (answer, gold)):
        if degrees.unit == "degree" and other.unit in ("", "radian") and r"\pi" in other.text:
            scaled = rf"\frac{{({degrees.text})\pi}}{{180}}"
            return equal(scaled, other.text) if degrees is gold else equal(other.text, scaled)
    return False


def _percent(gold: Value, answer: Value, equal: Equal) -> bool:
    share, bare = (gold, answer) if gold.unit in _SHARES else (answer, gold)
    whole = _SHARES[share.unit]
    if bare.unit:
        return False
    if share.number is None or bare.number is None:
        scaled = rf"\frac{{{share.text}}}{{{whole}}}"
        return equal(scaled, bare.text) if share is gold else equal(bare.text, scaled)
    value, other = share.number.value, bare.number.value
    return other == value / whole or (other == value and (share is gold or abs(other) > 1))


def _same_text(gold: Value, answer: Value, equal: Equal) -> bool:
    if gold.number is not None and answer.number is not None:
        return same_number(gold.number, answer.number)
    if _APART.search(gold.text) or _APART.search(answer.text):
        return gold.text == answer.text
    if _squeeze(gold.text) == _squeeze(answer.text):
        return True
    clocks = _CLOCK.fullmatch(gold.text), _CLOCK.fullmatch(answer.text)
    if all(clocks):
        return [int(part or 0) for part in clocks[0].groups()] == [int(part or 0) for part in clocks[1].groups()]
    if (ratio := _same_ratio(gold.text, answer.text)) is not None:
        return ratio
    if _worded(gold.text) or _worded(answer.text):
        return words(gold.text) == words(answer.text) and _operators(gold.text) == _operators(answer.text)
    if _differ(gold.text, answer.text):
        return False
    return _unnamed_equal(gold.text, answer.text, equal)


def _equated(gold: Value, answer: Value) -> tuple[str, str] | tuple[()] | None:
    """What to compare where one side is an equation: a + b = 7 says 7 of a quantity, x + 1 = 7 does not. None where none or both
    are."""
    gold_sides, answer_sides = split(gold.text, "="), split(answer.text, "=")
    if (len(gold_sides) > 1) == (len(answer_sides) > 1):
        return None
    left = max(gold_sides, answer_sides, key=len)[0]
    letters = re.sub(r"_\{?\d+\}?|\\[a-zA-Z]+", " ", left)
    several = len(set(re.findall("[a-zA-Z]", letters))) > 1 or re.search("[a-zA-Z] *:.*[a-zA-Z]", letters)
    named = several and not re.search(r"\d", letters) and not left.startswith("-")
    if named or len(gold_sides) > 2 or "$" in left:  # a chain that the ground truth ends is its own; a price is no side
        return gold_sides[-1], answer_sides[-1]
    return ()


def _differ(gold: str, answer: str) -> bool:
    r"""Primes, an \ldots, relations, or words that twist a number: what the library does not look at."""
    gold_marks, answer_marks = _marks(gold), _marks(answer)
    if re.search(r"\\c[au]p(?![a-zA-Z])", gold + answer):  # 1 ≤ |z| is an interval for the library
        return gold_marks[:2] != answer_marks[:2]
    return gold_marks != answer_marks


def _marks(text: str) -> tuple[int, bool, tuple[str, ...]]:
    relations = re.findall(
        r"[<>]|\\equiv|(?<![a-zA-Z}\d])\d+ *_|\\(?:le|ge|ne|to|rightarrow|neg|lnot|not|mapsto)(?![a-zA-Z])", text
    )
    twisted = [words(inner) for inner in re.findall(r"\\text\{([^{}]*)\}", text) if not is_noun(inner)]
    return text.count("'"), r"\ldots" in text, tuple(sorted({*relations, *twisted}))


def _operators(text: str) -> str:
    return re.sub(r"[^-+*/^|=]|(?<=[A-Za-z])-(?=[A-Za-z])", "", text)


def _unnamed_equal(gold: str, answer: str, equal: Equal) -> bool:
    return equal(gold, answer)


def _squeeze(text: str) -> str:
    """Spaces and needless braces apart, the same LaTeX."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", text))


def _same_ratio(gold: str, answer: str) -> bool | None:
    """1:2:3 is 2:4:6; None where neither is a ratio of plain numbers, of three or more."""
    sides = []
    for text in (gold, answer):
        parts = [part.strip() for part in text.split(":")]
        if len(parts) < 2 or not all(re.fullmatch(r"\d+(?:\.\d+)?", part) for part in parts):
            sides.append(None)
            continue
        sides.append([Fraction(part) for part in parts])
    if None in sides:
        return None if sides == [None, None] or 2 in [len(side) for side in sides if side] else False
    left, right = sides
    if len(left) != len(right):
        return False
    pivot = next((place for place, part in enumerate(left) if part), None)
    if pivot is None or not right[pivot]:
        return left == right
    return all(a * right[pivot] == b * left[pivot] for a, b in zip(left, right, strict=True))


def _worded(text: str) -> bool:
    """Words and nothing else: no product of variables."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if _FUNCTION.match(bare.strip()) or re.search(r"^-|[\d\\^_=+*/<>|(]", bare.strip("() ")):
        return False
    return (bare != text and len(words(text)) > 1) or bool(_LETTERS.search(bare))


def match(gold: str, answer: str, equal: Equal) -> bool | None:
    """Do the texts say the same? None where one of them cannot be read: prose around several formulas."""
    if (choice := _same_choice(gold, answer)) is not None:
        return choice

    def equal_and_worked_out(wanted: str, given: str) -> bool:
        return _to_be_done(given) <= _to_be_done(wanted) and equal(wanted, given)

    for alternative in re.split(r"\\?#\s*\\?#", gold):
        gold_nodes, answer_nodes = read(alternative), read(answer)
        if not gold_nodes or not answer_nodes:
            return None
        if any(same(left, right, equal_and_worked_out) for left in gold_nodes for right in answer_nodes):
            return True
    return False


def _to_be_done(formula: str) -> set[str]:
    return {name for name, pattern in _CALCULATES if pattern.search(formula)}


def _same_choice(gold: str, answer: str) -> bool | None:
    """The letters of a multiple choice; None where the ground truth is none."""
    wanted = _choice_letters(gold)
    if not wanted:
        return None
    given = _choice_letters(answer)
    if given:
        return given == wanted
    bare = _CHOICE_MARKUP.sub(r"\1", answer).strip()
    if DENIES.search(bare) or HEDGES.search(bare) or set(_OPTION.findall(bare)) - wanted:
        return False
    if len(wanted) > 1:
        several = _STATED_SEVERAL.fullmatch(bare)
        return several is not None and _choice_letters(several["english"] or several["chinese"]) == wanted
    stated = _STATED_FIRST.match(bare) or _STATED_LAST.fullmatch(bare) or _STATED_CORRECT.fullmatch(bare)
    return {stated[1].upper()} == wanted if stated else None


def _choice_letters(text: str) -> set[str]:
    bare = re.sub(r"\\(?:text|math)(?:bf|rm|it|sf)?(?![a-z])|\\boxed|\\[()\[\]]|[${}*\s]", "", text)
    if not re.fullmatch(r"\(?[A-H]\)?(?:(?:[,，、和与]|,?and)?\(?[A-H]\)?)*[.。]?", bare):
        return set()
    letters = re.findall("[A-H]", bare)
    single, apart, sorted_up = len(letters) == 1, re.search("[,，、和与]|and", bare), letters == sorted(set(letters))
    return set(letters) if len(set(letters)) == len(letters) and (single or apart or sorted_up) else set()
