"""Which scripts an output is written in, and whether it mixes languages: measured, never punished.

Letters are counted outside formulas, code, digits and punctuation. What a reader takes for a symbol is no letter either: a
Latin or Greek run of fewer than three (x, AB, cm, π), and compatibility forms count as what they stand for (full-width Ａ is A).

A letter is FOREIGN where its script is none of the question's. The scripts of a question are those that take a tenth of its
letters; without a question, the output's own main script. A word that stands in the question (a name, say) is not foreign.

An output MIXES languages where at least two letters are foreign, and these are a hundredth of its letters or twenty of them.
One stray letter is a symbol or a slip, and in a long output a few are; but a hundredth is about one word in a hundred, and
twenty letters are a clause, which a reader sees however long the rest is. On the 3,162 Chinese solutions of TAL-SCQ5K and
GAOKAO-Bench, foreign words are in one of a hundred, nearly all of them with English sentences left in: see docs/reward.md.

Left out: languages of one script (English beside French), which need a model to tell apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

QUESTION_SHARE = 0.1
MIXED_LETTERS = 2
MIXED_SHARE = 0.01
MIXED_CLAUSE = 20
SYMBOL_LENGTH = 2
"""Latin and Greek runs of at most so many letters are symbols or units."""

_RANGES = {
    "latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "greek": "\u0370-\u0373\u0376-\u037d\u0386-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u0481\u048a-\u052f",
    "hebrew": "\u05d0-\u05ea",
    "arabic": "\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u0963\u0971-\u097f",
    "thai": "\u0e01-\u0e4e",
    "hangul": "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3",
    "kana": "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff",
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
}
_SYMBOLIC = ("latin", "greek")
_WORDS = re.compile("|".join(f"(?P<{name}>[{ranges}]+)" for name, ranges in _RANGES.items()) + r"|(?P<other>[^\W\d_])")
_MAYBE_NOT_LATIN = re.compile("[\u00b5\u0370-\u1dff\u1f00-\u1fff\u2c00-\udfff\uf900-\uffff\U00010000-\U0010ffff]")
"""Matches every letter of another script, and a few others: where it finds nothing, no letter is foreign to a Latin question."""
_NOT_ASCII = re.compile("[^\x00-\x7f]+")
_APART = re.compile(
    r"```.*?(?:```|\Z)"
    r"|`[^`\n]+`"
    r"|\$\$.+?\$\$"
    r"|\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)"  # pandoc's rule, which keeps "$5 and $7" prose
    r"|\\[(\[]"  # the opener of a formula; its end is looked for apart
    r"|\\begin\{\w+\*?\}"
    r"|\\[A-Za-z]+"
    r"|</?(?:think|answer)>"
    r"|<\|[^|>\s]*\|>"
    r"|https?://\S+"
    r"|[\u2100-\u214f]",  # letterlike symbols: ℝ, ℵ
    re.DOTALL,
)
"""What is no prose. Every alternative ends at the next character that may end it, or goes on to the end of the line or text only
once, so a search through a text takes time in proportion to it."""
_CLOSERS = {"\\(": "\\)", "\\[": "\\]"}
_CLOSER = re.compile(r"\\(?:[)\]]|end\{\w+\*?\})")


@dataclass(frozen=True, slots=True)
class Languages:
    """What `measure_languages` found. shares: script → its part of the letters, largest first, adding up to 1; empty where there
    are no letters. foreign: the part that is foreign to the question; foreign_letters: how many those are."""

    shares: dict[str, float]
    foreign: float
    foreign_letters: int

    @property
    def mixed(self) -> bool:
        letters = self.foreign_letters
        return letters >= MIXED_LETTERS and (self.foreign >= MIXED_SHARE or letters >= MIXED_CLAUSE)


def measure_languages(text: str, question: str = "") -> Languages:
    """Pure. question: what the output answers, "" where it is not known."""
    words = _words(text)
    letters = Counter[str]()
    for script, word in words:
        letters[script] += len(word)
    total = letters.total()
    if not total:
        return Languages({}, 0.0, 0)
    is_foreign = _foreign_to(question, letters)
    foreign = sum(len(word) for script, word in words if is_foreign(script, word))
    return Languages({script: count / total for script, count in letters.most_common()}, foreign / total, foreign)


def foreign_spans(text: str, question: str = "") -> list[tuple[int, int]]:
    """[start, stop) in characters of each word that `measure_languages` counts as foreign, in order. Pure; for a reader's eye:
    each character is normalised by itself, so that the places are those of the text as it stands."""
    letters, words = Counter[str](), []
    for start, stop in _prose_spans(text):
        prose = text[start:stop]
        origin = range(start, stop + 1)
        if not prose.isascii() and not unicodedata.is_normalized("NFKC", prose):
            normal = [unicodedata.normalize("NFKC", character) for character in prose]
            origin = [start + place for place, characters in enumerate(normal) for _ in characters]
            prose = "".join(normal)
        for match in _WORDS.finditer(prose):
            if _counts(match):
                letters[match.lastgroup] += len(match.group())
                words.append((match.lastgroup, match.group(), origin[match.start()], origin[match.end() - 1] + 1))
    if not words:
        return []
    is_foreign = _foreign_to(question, letters)
    return [(start, stop) for script, word, start, stop in words if is_foreign(script, word)]


def mixes_languages(text: str, question: str) -> bool:
    """`measure_languages(text, question).mixed`, without counting what a Latin question and an output in Latin letters have in
    common: 16K tokens of English take microseconds, and with other letters among them a millisecond."""
    asked = _words(question)
    if (_scripts(asked) or {"latin"}) != {"latin"}:
        return measure_languages(text, question).mixed
    if text.isascii() or not _MAYBE_NOT_LATIN.search(text):
        return False
    if not asked:
        return measure_languages(text).mixed
    known = {word.casefold() for _, word in asked}
    others = " ".join(_NOT_ASCII.findall(_prose(text)))
    foreign = sum(len(word) for script, word in _words_of(others) if script != "latin" and word.casefold() not in known)
    if foreign < MIXED_LETTERS or foreign >= MIXED_CLAUSE:
        return foreign >= MIXED_LETTERS
    return measure_languages(text, question).mixed


def _words(text: str) -> list[tuple[str, str]]:
    """(script, run of its letters) in the prose of a text, without symbols."""
    return _words_of(_prose(text))


def _prose(text: str) -> str:
    """With a blank for each formula and the like."""
    return " ".join(text[start:stop] for start, stop in _prose_spans(text))


def _prose_spans(text: str) -> list[tuple[int, int]]:
    r"""[start, stop) of what is prose. An opener whose closer is missing is none, but `\begin` remains a command."""
    pieces, start, place = [], 0, 0
    last: dict[str, int] | None = None  # closer → where it stands last: what is not ahead must not be looked for ever again
    while found := _APART.search(text, place):
        opener, place = found.group(), found.end()
        if opener in _CLOSERS or opener.startswith("\\begin{"):
            closer = _CLOSERS.get(opener) or opener.replace("begin", "end", 1)
            least = place + (opener in _CLOSERS)  # a formula has a character
            if last is None:
                last = {each.group(): each.start() for each in _CLOSER.finditer(text)}
            if last.get(closer, -1) >= least:
                place = text.index(closer, least) + len(closer)
            elif opener in _CLOSERS:
                continue
            else:
                place = found.start() + len("\\begin")
        pieces.append((start, found.start()))
        start = place
    pieces.append((start, len(text)))
    return pieces


def _words_of(prose: str) -> list[tuple[str, str]]:
    if not prose.isascii():
        prose = unicodedata.normalize("NFKC", prose)
    return [(match.lastgroup, match.group()) for match in _WORDS.finditer(prose) if _counts(match)]


def _counts(match: re.Match[str]) -> bool:
    """Whether the run of letters is a word, not a symbol."""
    return len(match.group()) > SYMBOL_LENGTH or match.lastgroup not in _SYMBOLIC


def _foreign_to(question: str, letters: Counter[str]) -> Callable[[str, str], bool]:
    """Whether a word of this script is foreign to the question. letters: the output's, by script, not empty."""
    asked = _words(question)
    expected = _scripts(asked) or {letters.most_common(1)[0][0]}
    known = {word.casefold() for _, word in asked}
    return lambda script, word: script not in expected and word.casefold() not in known


def _scripts(words: list[tuple[str, str]]) -> set[str]:
    """Of a question."""
    letters = Counter[str]()
    for script, word in words:
        letters[script] += len(word)
    return {script for script, count in letters.items() if count >= QUESTION_SHARE * letters.total()}
