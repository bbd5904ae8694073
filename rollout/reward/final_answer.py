"""What an output says in the end: its final answer, whatever its form, and the letters of a multiple-choice answer."""

from __future__ import annotations

import re
import unicodedata

from curation.answers import last_boxed

_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_LETTER = "A-H"
_JOIN = r"(?:\s|[,、;/&()\[\]]|and|or|和|与|及|或)"
_ALONE = re.compile(rf"[(\[]?[{_LETTER}](?:{_JOIN}*[{_LETTER}])*[)\]]?\.?")
_HEAD = re.compile(rf"[(\[]?([{_LETTER}])[)\].、:,](?!\w*[{_LETTER}]\b)|[(\[]([{_LETTER}])[)\]]")
_ANOTHER = re.compile(rf"(?:\bor\b|\band\b|或|和|与|及|[;,])\s*[(\[]?([{_LETTER}])[)\].、:]")
_PHRASE = re.compile(
    rf"(?:答案|选项?|选择|应选|故选|\b[Aa]nswer|\b[Oo]ption|\b[Cc]hoice)(?:\s|is|are|为|是|:|[(\[*])*"
    rf"([{_LETTER}](?:{_JOIN}*[{_LETTER}])*)(?![A-Za-z])"
)
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|rm|bf|quad)\b|[${}*\\]")


def final_answer(text: str) -> str | None:
    """The text of the last answer block behind the thinking, complete or not; else the last \\boxed{…} there; else, where the
    thinking was closed or never opened, the last line. None where nothing of this stands in `text` (prefill and response).

    For models and outputs that do not keep to the R1 form. The paper compares with models that were never trained in it, so its
    correctness cannot depend on it either.
    """
    _, closed, behind = text.rpartition("</think>")
    thought = closed or "<think>" not in text
    blocks = [block.strip() for block in _BLOCK.findall(behind)]
    if blocks and blocks[-1]:
        return blocks[-1]
    boxed = last_boxed(behind)
    if boxed:
        return boxed
    lines = [line.strip() for line in behind.splitlines() if line.strip()]
    return lines[-1] if thought and lines else None


def chosen_letters(answer: str) -> frozenset[str] | None:
    """The options that an answer names: "B", "(b)", "B. 3 cm", "\\boxed{\\text{B}}", "故选：B", "the answer is (B)", "A、C". All
    of them, so that one who hedges ("A or B") is not right. None where it names none plainly ("A triangle")."""
    plain = unicodedata.normalize("NFKC", answer)
    plain = " ".join(_LATEX.sub(" ", plain).replace("。", ".").split())
    if len(plain.strip("()[]. ")) == 1:
        plain = plain.upper()
    if _ALONE.fullmatch(plain):
        return frozenset(re.findall(f"[{_LETTER}]", plain))
    if head := _HEAD.match(plain):
        return frozenset([head[1] or head[2], *_ANOTHER.findall(plain, head.end())])
    named = _PHRASE.findall(plain)
    return frozenset(re.findall(f"[{_LETTER}]", named[-1])) if named else None
