r"""Prose that `read` finds no structure in, judged by its last statement, and only where that says one thing.

The last sentence with a number or a formula counts, from its last copula on. It counts where one number or formula stands there,
where no word denies, hedges, compares or calculates (`phrases`), and where the sentences behind take nothing back. A ground truth
that cannot be read is its whole text: the answer must have the same numbers, with the same words behind them, in the same order.
"""

from __future__ import annotations

import re

from rollout.reward.answers.match import Equal, match
from rollout.reward.answers.phrases import DENIES, HEDGES, TWISTS
from rollout.reward.answers.read import read
from rollout.reward.answers.text import boxes, clean
from rollout.reward.answers.units import is_unit

_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z\\$])|[。！？\n]+|\\n(?![a-z])")
_TOKEN = re.compile(
    r"(?<!\\)\$\$.+?\$\$|(?<!\\)\$[^$]*\\boxed[^$]*\$|(?<!\\)\$(?=\S)[^$]+?(?<!\\)\$|\\\(.+?\\\)|\\\[.+?\\\]|"
    r"\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|[$]?[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?",
    re.DOTALL,
)
_COPULA = re.compile(
    r"\b(?:is|are|was|be|equals?|get|have|has|obtain|find|gives?|answer|it's|(?:increas|decreas|ris|chang)es by)\b|"
    r"等于|[为是得]|[:：]|(?<![<>!])=(?=\s*\0)",
    re.IGNORECASE,
)
"""Searched where numbers and formulas are blotted out."""
_RETRACTS = re.compile(r"\b(?:not|wrong|incorrect|mistake|no)\b|n't\b|不|错", re.IGNORECASE)
_FINAL = re.compile(r"\bfinal answer\b.*\d", re.IGNORECASE | re.DOTALL)
_RELATIVE_CLAUSE = re.compile(r"\b(?:that|which|whose|who|satisfying)\b.*", re.DOTALL)
_FIGURES = re.compile(r"[-−]?\d+(?:\.\d+)?")
_COMMANDS = re.compile(r"\\[a-zA-Z]+|(?<![a-zA-Z])(?:and|or)(?![a-z])")
_WORDS = re.compile(r"[a-zA-Z]{2,}|[\u4e00-\u9fff]")
_MARKS = re.compile(r"[\s,.;:!?，。；：！？、$\\(){}\[\]]+")


def same_prose(gold: str, answer: str, equal: Equal) -> bool:
    """Does the answer say what the ground truth does, where one of them cannot be read?"""
    gold, answer = _unescaped(gold), _unescaped(answer)
    whole = gold.count("{") == gold.count("}")
    wanted = gold if whole and read(gold) else last_statement(gold, trusted=True) if _is_solution(gold) else None
    if wanted is None:
        return _same_text(gold, answer)
    given = answer if read(answer) else last_statement(answer)
    return given is not None and match(wanted, given, equal) is True


def _unescaped(text: str) -> str:
    r"""\\frac is \frac where no rows are."""
    return text if r"\begin" in text else re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)


def _is_solution(gold: str) -> bool:
    """Sentences that lead to one statement, not several quantities."""
    return bool(boxes(gold)) or len([part for part in _SENTENCES.split(gold) if part.strip()]) > 1


def is_empty(text: str) -> bool:
    """Neither a word nor a number in it."""
    return not read(text) and re.search(r"[^\W_]", text) is None


def last_statement(text: str, trusted: bool = False) -> str | None:
    """What the last statement says, as one number or formula, or as boxes joined to a list; None where there is none, where it
    says more, or where it is taken back. trusted: nothing is taken back."""
    sentences = [part for part in _SENTENCES.split(text.strip()) if part.strip()]
    announced = [place for place, sentence in enumerate(sentences) if _FINAL.search(sentence)]
    if announced:
        if not trusted and any(map(_RETRACTS.search, sentences[announced[-1] + 1 :])):
            return None
        sentences = sentences[: announced[-1] + 1]
    for sentence in reversed(sentences):
        tokens = [found for found in _TOKEN.finditer(sentence) if re.search(r"\d|boxed|=", found[0])]
        if tokens:
            return _said(sentence, tokens)
        if not trusted and _RETRACTS.search(sentence):
            return None
    return None


def _said(sentence: str, tokens: list[re.Match[str]]) -> str | None:
    if found := boxes(sentence):
        outside = sentence
        for start, end, _ in reversed(found):
            outside = outside[:start] + " " + outside[end:]
        return None if DENIES.search(outside) or HEDGES.search(outside) else " , ".join(content for _, _, content in found)
    blotted = _TOKEN.sub(lambda found: "\0" * len(found[0]), sentence)
    start = max((found.end() for found in _COPULA.finditer(blotted) if found.end() <= tokens[-1].start()), default=0)
    said = [found for found in tokens if found.start() >= start]
    if len(said) != 1 or not _is_spent(sentence[:start]):
        return None
    rest = _RELATIVE_CLAUSE.sub("", _TOKEN.sub(" ", sentence[start:]))
    before, after = sentence[: said[0].start()], sentence[said[0].end() :]
    if TWISTS.search(rest) or re.search(r"[\w^_/*+<>|~\\-]$", before) or re.match(r"[\d^_/*+<>|~\\'-]", after):
        return None
    unit = re.match(r"\s*[^\s,.;]{1,8}", after)
    return said[0][0] + (unit[0] if unit and is_unit(clean(unit[0])) else "")


def _is_spent(before: str) -> bool:
    """Has each denial its own number, as in `not 10, it is 12`? `I do not think that it is 12` has none."""
    denials = list(DENIES.finditer(before))
    return HEDGES.search(before) is None and (not denials or _FIGURES.search(before, denials[-1].end()) is not None)


def _same_text(gold: str, answer: str) -> bool:
    """The same words and numbers, marks and spaces apart; the same numbers in order, where the ground truth has no words."""
    gold, answer = clean(gold), clean(answer)
    if _FIGURES.findall(gold) != _FIGURES.findall(answer):
        return False
    left, right = (_MARKS.sub("", text).casefold() for text in (gold, answer))
    worded = any(_WORDS.search(_COMMANDS.sub(" ", text)) for text in (gold, answer))
    return bool(left) and (left == right or (not worded and len(_FIGURES.findall(gold)) > 1))
