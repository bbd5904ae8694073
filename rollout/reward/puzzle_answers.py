"""What an answer to a reasoning-gym puzzle may not hold, since some of its scorers execute answers as Python: those of n_queens,
spiral_matrix, binary_matrix and string_insertion call `eval`, and those that read formulas SymPy's `parse_expr`, which is `eval`
too. An answer could give the question back (`integrate(…)`), or replace the scorer.

So, before a scorer sees it, an answer is wrong that calls a function but for the elementary ones, looks up an attribute, is
long, or has in a formula what belongs in none. What stands in the puzzle's own ground truth is no reason against an answer, but
for the names in _NEVER. Names are compared as Python does, after NFKC: `ｅｘｐａｎｄ` is `expand`.

And what some scorers forget to ask: whether what they read as a number is one (`refusal`), whether an arithmetic puzzle was
solved with its own numbers (`misuse`), and whether the answer is the answer (`exact`).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

LONGEST = 4096
"""Characters of an answer, and four times as many as the ground truth has on top."""

UNSCORABLE = {"propositional_logic": "its scorer takes the premises given back, and it has no answer to hold one to"}
"""Puzzle → why no verdict on it means anything."""

_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "ln",
        "sqrt",
        "abs",
        "Abs",
    ]
)
_CALLS = {"boxnet": frozenset({"move"})}
"""Puzzle → names before a parenthesis that its right answers have; it reads JSON and executes nothing."""
_NEVER = frozenset({"Integral"})
"""SymPy leaves an integral that it cannot solve as it is, in ground truths too; it is the question."""

_FORMULAS = frozenset({"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"})
_NO_FORMULA = re.compile(r"[^\w\s.,+\-*/^()!]|\b(?:and|or|not|if|else|for|in|is)\b")
"""SymPy executes texts within a formula as well, so no quote, bracket or escape belongs there; and `4*6 or 3 or 1` uses all its
numbers and calculates with two."""

_ARITHMETIC = frozenset({"puzzle24", "countdown"})
_NO_ARITHMETIC = re.compile(r"[^0-9\s+\-*/()]|\*\s*\*|/\s*/")
"""SymPy joins `* *` to a power."""

_NO_NUMBER = re.compile(r"(?<![^\W\d_])(?:nan|inf|infinity)[ij]?(?![^\W_])", re.IGNORECASE)
"""float() and complex() read these. The distance to nan is nan, and to complex_arithmetic exp(-nan) is a full score."""
_WORDS_ASKED = frozenset({"word_ladder"})
"""Nan is a word there."""
_SPACES_DROPPED = frozenset({"complex_arithmetic"})
"""Puzzles whose scorer reads `n an` as `nan`."""
_ROUNDED = Fraction(1, 10**6)
"""By how much of itself a probability of coin_flip, of which the ground truth has ten digits, may be missed."""

_WORD = re.compile(r"(\w+)[\s\\]*(\(?)")
_CALL_OF_VALUE = re.compile(r"[)\]}'\"][\s\\]*\(")
_ATTRIBUTE = re.compile(r"\.[\s\\]*([^\W\d]\w*)")
_DECIMAL = re.compile(r"(?<=\d)\.(?=[eE][-+]?\d)")
_PARTS = ("__", "#", "\\", "lambda", "import", ":=")
"""A comment or an escape hides what follows from the expressions above."""


def refusal(puzzle: str, answer: str, gold: str) -> str | None:
    """Why the answer must not reach the puzzle's scorer, or None."""
    if len(answer) > LONGEST + 4 * len(gold):
        return f"{len(answer)} characters, more than {LONGEST + 4 * len(gold)}"
    answer, gold = unicodedata.normalize("NFKC", answer), unicodedata.normalize("NFKC", gold)
    if puzzle in _FORMULAS and (strange := _NO_FORMULA.search(answer)):
        return f"{strange.group()!r} in a formula"
    for part in _PARTS:
        if part in answer and part not in gold:
            return f"it has {part!r}"
    allowed = (_FUNCTIONS | _CALLS.get(puzzle, frozenset()) | set(_called(gold))) - _NEVER
    if called := next((name for name in _called(answer) if name not in allowed), None):
        return f"it calls {called[:40]!r}"
    if _CALL_OF_VALUE.search(answer) and not _CALL_OF_VALUE.search(gold):
        return "it calls a value"
    read = answer.replace(" ", "") if puzzle in _SPACES_DROPPED else answer
    if puzzle not in _WORDS_ASKED and (word := _NO_NUMBER.search(read)) and not _NO_NUMBER.search(gold):
        return f"{word.group()!r} is no number"
    names = set(_ATTRIBUTE.findall(gold))
    if looked := next((name for name in _ATTRIBUTE.findall(_DECIMAL.sub("", answer)) if name not in names), None):
        return f"it looks up {looked[:40]!r}"
    return None


def misuse(puzzle: str, answer: str, metadata: dict[str, Any]) -> str | None:
    """Why an answer to puzzle24 or countdown is no arithmetic with each of metadata["numbers"] once, or None, as for every other
    puzzle. The scorer of puzzle24 takes any four numbers, and that of countdown does not see those in `784e0+0e0*(16+76)`."""
    if puzzle not in _ARITHMETIC:
        return None
    if strange := _NO_ARITHMETIC.search(answer):
        return f"{strange.group()!r} is no number, + - * / or parenthesis"
    used, given = sorted(re.findall("[0-9]+", answer)), sorted(map(str, metadata["numbers"]))
    if used != given:
        return f"it uses the numbers {', '.join(used)[:100] or 'none'}, not {', '.join(given)}"
    return None


def exact(puzzle: str, answer: str, gold: str, metadata: dict[str, Any]) -> bool:
    """Whether an answer that the scorer finds right is so: to puzzle24 or countdown, whether its value is the target; to
    coin_flip, whether it is the ground truth but for the rounding of either; to game_of_life_halting, whether it is that word.
    True for every other puzzle.

    The scorer of puzzle24 cuts 24.5 down to 24, and that of countdown allows a hundred-thousandth. That of coin_flip allows a
    ten-thousandth of small probabilities too, and gives `0` a full score as the beginning of 0.3125; that of game_of_life_halting
    asks only whether both texts are empty."""
    if puzzle == "game_of_life_halting":
        return answer.strip().casefold() == gold.strip().casefold()
    if puzzle == "coin_flip":
        try:
            value, wanted = (Fraction(text.replace(",", "")) for text in (answer, gold))
        except (ValueError, ZeroDivisionError):
            return False
        return abs(value - wanted) <= _ROUNDED * abs(wanted)
    if puzzle not in _ARITHMETIC:
        return True
    from sympy.parsing.sympy_parser import parse_expr

    return bool(parse_expr(answer.strip()) == metadata.get("target", 24))


def _called(text: str) -> list[str]:
    """The names before an opening parenthesis, without digits before them: Python reads `2sin(x)` as 2 and sin(x). In one go
    over the words, since a search for names would start at each letter."""
    words = (word.lstrip("0123456789") for word, parenthesis in _WORD.findall(text) if parenthesis)
    return [name for name in words if name]
