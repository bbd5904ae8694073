r"""Exact values of plain numbers, so that no comparison of two of them goes through a float or a rounding.

Read: 72, -3.5, .5, 1,000, 1/3, \frac{1}{3}, mixed numbers (3\frac{1}{2}, 14(1/2), 3 1/2), powers of ten (1e-5,
3\times 10^{6}), repeating decimals (0.1\overline{6}, 0.\dot{3}), bases (101_2), and Chinese numerals (三十五, 二又三分之一,
百分之五十, 3万, 负二, 1.2亿).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 400
"""Characters of a number that is read here, and the largest power of ten: a text like 1e999999999 must not cost memory."""


@dataclass(frozen=True, slots=True)
class Number:
    """value: exact. decimals: places after the point of a plain decimal, 0 for anything else. base: 0 where none is given."""

    value: Fraction
    decimals: int = 0
    base: int = 0
    digits: str = ""


_SIGN = r"(?P<sign>[-+]?)\s*"
_INTEGER = r"[1-9]\d{0,2}(?:[,， ]\d{3})+(?!\d)|\d+"
_DECIMAL = re.compile(rf"{_SIGN}(?P<whole>{_INTEGER})?(?:\.(?P<part>\d+)|\.)?")
_COMMA_DECIMAL = re.compile(rf"{_SIGN}(?P<whole>\d+),(?P<part>\d{{2}}|\d{{4,}}|(?<=^0,)\d+|(?<=^-0,)\d+)")
_RATIO = re.compile(
    rf"{_SIGN}(?:\(?\s*(?P<top>-?\d+)\s*/\s*(?P<bottom>\d+)\s*\)?|\\frac\s*\{{\s*(?P<top2>-?\d+)\s*\}}\s*\{{\s*(?P<bottom2>-?\d+)\s*\}}|\\frac\s*(?P<top3>\d)\s*(?P<bottom3>\d))"
)
_MIXED = re.compile(
    rf"{_SIGN}(?P<whole>\d+)(?:\s*\(\s*(?P<top>\d+)\s*/\s*(?P<bottom>\d+)\s*\)|(?:\s+(?:and\s+)?|\s*又\s*)(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+)|"
    r"\s*\\frac\s*\{\s*(?P<top3>\d+)\s*\}\s*\{\s*(?P<bottom3>\d+)\s*\}|\s*\\frac\s*(?P<top4>\d)\s*(?P<bottom4>\d))"
)
_POWER = re.compile(
    rf"{_SIGN}(?:(?P<factor>\d+(?:\.\d+)?|\.\d+)\s*(?:[eE]|(?:\\times|\\cdot|\*|x|X)\s*10\s*\^\s*))\{{?\s*(?P<exponent>[-+]?\d+)\s*\}}?"
)
_TEN = re.compile(rf"{_SIGN}10\s*\^\s*\{{?\s*(?P<exponent>[-+]?\d+)\s*\}}?")
_REPEATING = re.compile(
    rf"{_SIGN}(?P<whole>\d+)\.(?P<part>\d*)(?:\\overline\s*\{{(?P<period>\d+)\}}|\((?P<cycle>\d+)\)|(?P<dots>\\dot\s*\{{?\d\}}?\d*(?:\\dot\s*\{{?\d\}}?)?))"
)
_BASE = re.compile(r"(?P<digits>[0-9A-Fa-f]+)\s*_\s*\{?\s*\(?(?P<base>\d+)\)?\s*\}?")
_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
    "壹": 1,
    "贰": 2,
    "叁": 3,
}
_STEPS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_CHINESE = re.compile(r"[零〇一二两三四五六七八九十百千万亿壹贰叁]+(?:点[零〇一二三四五六七八九]+)?")


def number(text: str) -> Number | None:
    """The exact number that the whole cleaned text is; None for anything else."""
    text = text.strip()
    if not text or len(text) > _LONGEST:
        return None
    while (inner := re.fullmatch(r"\{([^{}]*)\}|\(\s*([-+]?[\d.]+)\s*\)", text)) is not None:
        text = (inner[1] or inner[2] or "").strip()
    for read in (_decimal, _fraction, _power, _repeating, _based, _chinese):
        if (found := read(text)) is not None:
            return found
    return None


def same_number(gold: Number, answer: Number) -> bool:
    """Exactly equal; or the one a fraction that no decimal ends (1/3), and the other it to at least 6 places, rounded or cut off.
    Of numbers in a base, the digits count where only the ground truth names the base."""
    if gold.base or answer.base:
        if gold.base and answer.base:
            return gold.value == answer.value
        if gold.value == answer.value and {gold.base, answer.base} == {0, 10}:
            return True
        return bool(gold.base) and gold.digits == answer.digits
    if gold.value == answer.value:
        return True
    for decimal, other in ((gold, answer), (answer, gold)):
        if decimal.decimals >= 6 and not other.decimals and not _ends(other.value):
            places = 10**decimal.decimals
            return decimal.value in (Fraction(round(other.value * places), places), Fraction(int(other.value * places), places))
    return False


def _ends(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _signed(found: re.Match[str], value: Fraction) -> Fraction:
    return -value if found["sign"] == "-" else value


def _decimal(text: str) -> Number | None:
    found = _DECIMAL.fullmatch(text)
    if found is not None and (found["whole"] or found["part"]):
        whole = re.sub(r"[,， ]", "", found["whole"] or "0")
    else:
        found = _COMMA_DECIMAL.fullmatch(text)
        if found is None:
            return None
        whole = found["whole"]
    part = found["part"] or ""
    value = _signed(found, Fraction(int(whole + part), 10 ** len(part)))
    return Number(value, len(part), digits=whole.lstrip("0") or "0" if not part else "")


def _pick(found: re.Match[str], name: str) -> int:
    return int(next(value for key, value in found.groupdict().items() if key.rstrip("234") == name and value is not None))


def _fraction(text: str) -> Number | None:
    if (found := _RATIO.fullmatch(text)) is not None:
        bottom = _pick(found, "bottom")
        return Number(_signed(found, Fraction(_pick(found, "top"), bottom))) if bottom else None
    if (found := _MIXED.fullmatch(text)) is not None:
        bottom = _pick(found, "bottom")
        return Number(_signed(found, int(found["whole"]) + Fraction(_pick(found, "top"), bottom))) if bottom else None
    return None


def _power(text: str) -> Number | None:
    found = _POWER.fullmatch(text) or _TEN.fullmatch(text)
    if found is None or len(found["exponent"]) > 4 or abs(int(found["exponent"])) > _LONGEST:
        return None
    return Number(_signed(found, Fraction(found.groupdict().get("factor") or 1) * Fraction(10) ** int(found["exponent"])))


def _repeating(text: str) -> Number | None:
    found = _REPEATING.fullmatch(text)
    if found is None:
        return None
    period = found["period"] or found["cycle"] or re.sub(r"\D", "", found["dots"])
    start, places = found["part"], len(found["part"])
    value = Fraction(int(found["whole"] + start), 10**places) + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    return Number(_signed(found, value))


def _based(text: str) -> Number | None:
    found = _BASE.fullmatch(text)
    if found is None or not 2 <= int(found["base"]) <= 16 or not re.search(r"\d", found["digits"]):
        return None
    base = int(found["base"])
    try:
        return Number(Fraction(int(found["digits"], base)), base=base, digits=found["digits"].upper().lstrip("0") or "0")
    except ValueError:
        return None


def _chinese(text: str) -> Number | None:
    sign = -1 if text.startswith(("负", "-")) else 1
    text = text.removeprefix("负").removeprefix("-").strip()
    if text.startswith("百分之"):
        part = _whole(text.removeprefix("百分之"))
        return None if part is None else Number(sign * part / 100)
    if "分之" in text:
        bottom, _, top = text.partition("分之")
        integer, _, bottom = bottom.rpartition("又")
        values = [_whole(part) for part in (integer or "零", bottom, top)]
        if None in values or not values[1]:
            return None
        return Number(sign * (values[0] + values[2] / values[1]))
    value = _whole(text)
    return None if value is None else Number(sign * value)


def _whole(text: str) -> Fraction | None:
    """三十五, 一万二千, 十点五, 3万, 1.2亿."""
    if (mixed := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([百千万亿]{0,2})", text)) is not None:
        value = Fraction(mixed[1])
        for step in mixed[2]:
            value *= _STEPS.get(step) or _MYRIADS[step]
        return value
    if (pieces := re.findall(r"(\d+(?:\.\d+)?)([百千万亿]{1,2})", text)) and text == "".join(map("".join, pieces)):
        values = [_whole("".join(piece)) for piece in pieces]
        return sum(values, Fraction(0)) if values == sorted(values, reverse=True) else None
    if _CHINESE.fullmatch(text) is None:
        return None
    text, _, part = text.partition("点")
    total, section, digit = 0, 0, None
    if len(text) > 1 and not re.search("[十百千万亿]", text):
        total = int("".join(str(_DIGITS[character]) for character in text))
    else:
        for character in text:
            if character in _DIGITS:
                digit = _DIGITS[character]
            elif character in _STEPS:
                section, digit = section + (1 if digit is None else digit) * _STEPS[character], None
            else:
                section, myriad = section + (digit or 0), _MYRIADS[character]
                if not total + section:
                    return None
                total, section, digit = (total + section) * myriad if total < myriad else total + section * myriad, 0, None
        before = (_STEPS | _MYRIADS).get(text[-2:-1], 1)  # 二百五 is 250, 三千六 3600
        total += section + (digit or 0) * (before // 10 if before > 10 else 1)
    decimals = "".join(str(_DIGITS[character]) for character in part)
    return Fraction(total) + (Fraction(int(decimals), 10 ** len(decimals)) if decimals else 0)
