"""Getting the ground truth out of an answer field, and reading it as a number."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_BRACES = re.compile(r"(?<!\\)[{}]")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_RATIO = re.compile(r"([-+]?\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*\{?\s*([-+]?\d+)\s*\}?\s*\{\s*(\d+)\s*\}")
_SHEET_RATIO = re.compile(r"\(?\(?(\d+)\)?/\(?(\d+)\)?\)?")
_SHEET_MIXED = re.compile(r"(\d+)\(\(?(\d+)\)?/\(?(\d+)\)?\)")
_ENGLISH = "none,null,nan,n/a,na,not found,notfound,no answer,unknown,undefined,answer"
_CHINESE = "无,略,无答案,暂无,暂无答案,见解析,答案见解析,详见解析,解析略,答案略,省略,待定,未知"
_PLACEHOLDERS = frozenset(("", "?", "-", "--", "/", "…", *_ENGLISH.split(","), *_CHINESE.split(",")))


def after_hashes(text: str) -> str | None:
    """GSM8K: what follows the last `####`."""
    return text.rpartition("####")[2].strip() if "####" in text else None


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{…}, with its braces matched; None where there is none."""
    starts = {match.end() for match in _BOXED.finditer(text)}
    found: tuple[int, int] | None = None
    opened: list[int] = []
    for match in _BRACES.finditer(text):  # once over the text, however often it opens a box
        if match[0] == "{":
            opened.append(match.end())
        elif opened and (start := opened.pop()) in starts and (found is None or start > found[0]):
            found = start, match.start()
    return None if found is None else text[found[0] : found[1]].strip()


def boxed_or_short(text: str) -> str | None:
    """s1K and its like: the field is a whole solution, or the bare answer."""
    boxed = last_boxed(text)
    return boxed if boxed is not None else (text.strip() if len(text) <= 100 and "\n" not in text.strip() else None)


def sheet_fraction(text: str) -> str | None:
    """Math23K and APE210K write fractions as `((3)/(4))` and `1((1)/(2))`; as LaTeX they can be verified."""
    text = text.strip()
    if mixed := _SHEET_MIXED.fullmatch(text):
        whole, top, bottom = map(int, mixed.groups())
        return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"
    if "(" in text and (ratio := _SHEET_RATIO.fullmatch(text)):
        return rf"\frac{{{ratio[1]}}}{{{ratio[2]}}}"
    return text


def is_placeholder(answer: str | None) -> bool:
    """No answer at all, or a word that stands for none ("N/A", 略, 见解析)."""
    return answer is None or " ".join(answer.split()).strip("。.()（）[]【】").casefold() in _PLACEHOLDERS


def as_number(answer: str) -> Fraction | None:
    """The exact value of a plain number, a ratio of integers or a LaTeX fraction; None for anything else (units, %, formulas)."""
    text = answer.strip().strip("$").replace("\\$", "").strip()
    if len(text) > 60:
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if ratio := _RATIO.fullmatch(text):
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    if (frac := _FRAC.fullmatch(text)) and int(frac[3]):
        return Fraction(int(frac[2]), int(frac[3])) * (-1 if frac[1] == "-" else 1)
    return None


def is_plain_number(answer: str) -> bool:
    """A number as math-verify surely reads it, whole and alone: 72, -3.5, 1,000."""
    return len(answer) <= 40 and _PLAIN.fullmatch(answer) is not None


def as_value(answer: str) -> float:
    """`as_number` as a float; NaN where the answer is no number, or one beyond a float's range."""
    number = as_number(answer)
    try:
        return math.nan if number is None else float(number)
    except OverflowError:
        return math.nan
