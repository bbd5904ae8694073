r"""Single formulas, compared by math-verify, and what it takes for equal and must not.

The library compares a decimal after rounding to 6 places, and a difference after cutting off what is below 1e-15: 1e-8 equals
2e-8 for it, and 1.6 \times 10^{-19} equals 9.1 \times 10^{-31}. And it simplifies the difference of two formulas to see whether
it is 0, which is slow, and fails where decimals stand among symbols. So formulas are first evaluated; the library decides on the
rest. Without decimals nearness to 40 digits may reject and never accepts: rationals are equal or not, and other values must agree
to more digits than all numbers in the two formulas have, so that neither 1 - 2^{-2024} is 1 nor \sqrt{10^{60}+1} is 10^{30}.

Nothing here bounds its own time (`rollout.reward.rule_worker`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any
from zlib import crc32

from math_verify import LatexExtractionConfig, parse, verify
from sympy import (
    Derivative,
    Eq,
    Expr,
    Float,
    Function,
    Integral,
    Limit,
    Number,
    Pow,
    Product,
    Rational,
    Sum,
    Symbol,
    cos,
    cot,
    csc,
    exp,
    nan,
    sec,
    sin,
    tan,
    zoo,
)
from sympy.core.function import AppliedUndef

from rollout.reward.answers.numbers import number

RELATIVE = 2e-6
"""The most by which a number that contains a decimal may differ, relative to its size: the library's 6 places at size 1."""
_DIGITS = 40
_SPARE = 15
"""Digits that are computed and not compared."""
_MOST_DIGITS = 20_000
_SCALES = (Rational(1), Rational(2, 7), Rational(-23, 5))
"""Symbols take values between 1 and 2 times one of these."""

_BOUND = (Derivative, Integral, Limit, Sum, Product)
"""What binds its symbols, which cannot take values."""
_SMOOTH = (exp, sin, cos, tan, cot, sec, csc)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")


def _plain() -> tuple[Any, ...]:
    """The library's reading of LaTeX, without its removal of units, for which 2t is 2 tonnes, and without its other readings,
    which take the last number out of what is no formula."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return (LatexExtractionConfig(normalization_config=config, boxed_match_priority=-1),)


_FORMULA = _plain()


def equal(gold: str, answer: str) -> bool:
    """Is the answer's formula equal to the ground truth's? Both cleaned LaTeX without delimiters."""
    if not gold or not answer:
        return False
    if _equal(_formula(gold), _formula(answer)):
        return True
    # Decimals within symbols make floats, which no simplification brings together: 10^5/0.007 and 10^8/7.
    if re.search(r"[a-zA-Z]", gold) and (_DECIMAL.search(gold) or _DECIMAL.search(answer)):
        return _equal(_formula(_exact(gold)), _formula(_exact(answer)))
    return False


def _exact(text: str) -> str:
    return _DECIMAL.sub(lambda found: rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}", text)


@lru_cache(maxsize=4096)
def _formula(text: str) -> list[Any]:
    """Kept, and numbers without the parser: parsing takes the time, and the outputs of a group share their ground truth."""
    if (plain := number(text)) is not None and not plain.base:
        value = Rational(plain.value.numerator, plain.value.denominator)
        return [Float(value, _DIGITS) if plain.decimals else value]
    text = re.sub(r"(?<![a-zA-Z\\])E(?=_)", r"\\Xi", text)  # the library takes E for Euler's number and E_1 for nothing
    return _parts(parse(f"${text}$", _FORMULA, parsing_timeout=None))


def _parts(parsed: list[Any]) -> list[Any]:
    """12:00 parses as 12/0; kept, it would equal every other x:00."""
    return [part for part in parsed if isinstance(part, str) or (part is not zoo and part is not nan)]


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    return any(_same(left, right) for left in gold for right in answer)


def _same(gold: Any, answer: Any) -> bool:
    probed = _probe(gold, answer)
    if probed is not None:
        return probed
    # The library's own time limits are SIGALRM handlers; None switches them off.
    return bool(verify(gold, answer, timeout_seconds=None))


def _probe(gold: Any, answer: Any) -> bool | None:
    """Both formulas' values at some points: equal at all, or different at one; None where that does not decide.

    Two equations are equal where the ratio of their differences of sides is the same at all. Smooth formulas that agree at three
    points that have nothing to do with them are equal: a few evaluations tell what takes simplification a second.
    """
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        sides = gold.lhs - gold.rhs, answer.lhs - answer.rhs
        if gold.has(Float) or answer.has(Float) or not all(map(_is_smooth, sides)):
            return None
        if any(side.has(*_BOUND) for side in sides):
            return None
        points = [[_placed(side, scale) for side in sides] for scale in _SCALES]
        left, right = points[0]
        if _at(left) in (None, 0) or _at(right) in (None, 0):
            return None
        return True if all(_agree(one * right, other * left) for one, other in points[1:]) else None
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or isinstance(gold, Symbol) or isinstance(answer, Symbol):
        return None
    if any(side.has(*_BOUND) for side in (gold, answer)):
        return None
    floats = gold.has(Float) or answer.has(Float)
    symbols = gold.free_symbols | answer.free_symbols
    undecided = floats or (bool(symbols) and not (_is_smooth(gold) and _is_smooth(answer)))
    for scale in _SCALES if symbols else _SCALES[:1]:
        left, right = _placed(gold, scale), _placed(answer, scale)
        if floats:
            values = _at(left), _at(right)
            agree = None if None in values else _near(*values, RELATIVE)
        else:
            agree = _agree(left, right)
        if agree is False:
            return False
        undecided = undecided or agree is None
    return None if undecided else True


def _placed(formula: Any, scale: Rational) -> Any:
    """The formula at a point."""
    return formula.xreplace({symbol: _coordinate(symbol.name, scale) for symbol in formula.free_symbols})


def _at(formula: Any, digits: int = _DIGITS) -> Any:
    """The real value of a formula without symbols; None where there is none."""
    if formula.has(AppliedUndef, nan, zoo):
        return None
    try:
        value = formula.evalf(digits)
    except Exception:  # whatever SymPy raises: this probe does not decide
        return None
    return value if isinstance(value, Number) and value.is_finite else None


def _agree(left: Any, right: Any) -> bool | None:
    """Are two formulas without symbols and decimals equal? None where they have no real value, or too large numbers."""
    values = _at(left), _at(right)
    if None in values:
        return None
    if not _near(*values, 10.0 ** (_SPARE - _DIGITS)):
        return False
    left, right = left.doit(), right.doit()
    if isinstance(left, Rational) and isinstance(right, Rational):
        return left == right
    digits = 2 * _DIGITS + 2 * (_length(left) + _length(right))
    if digits > _MOST_DIGITS:
        return None
    values = _at(left, digits), _at(right, digits)
    return None if None in values else _near(*values, Rational(1, 10 ** (digits - _SPARE)))


def _length(formula: Any) -> int:
    """Digits of all numbers in it."""
    return sum((part.p.bit_length() + part.q.bit_length()) // 3 + 1 for part in formula.atoms(Rational))


def _coordinate(name: str, scale: Rational) -> Rational:
    return scale * Rational(1009 + crc32(f"{scale} {name}".encode()) % 997, 1009)


def _is_smooth(formula: Expr) -> bool:
    """One rule everywhere, so that what is equal on a stretch is equal: no |x - 5|, no floor, no root of what may change sign."""
    return all(isinstance(part, _SMOOTH) for part in formula.atoms(Function)) and all(
        power.exp.is_Integer or power.base.is_Symbol or (power.base.is_number and power.base.is_positive)
        for power in formula.atoms(Pow)
    )


def _near(left: Any, right: Any, relative: Any) -> bool:
    return bool(abs(left - right) <= relative * max(abs(left), abs(right)))
