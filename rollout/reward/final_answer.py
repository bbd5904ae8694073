"""What an output says in the end: its final answer, whatever its form, and the letters of a multiple-choice answer."""

from __future__ import annotations

import re
import unicodedata

from curation.answers import last_boxed

_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", re.DOTALL)
_LETTER = "A-H"
_JOIN = r"(?:\s|[,、;/&()\[\]]|and|or|和|与|及|或)"
_ALONE = re.compile(rf"[(\[]?[{_LETTER}](?:{_JOIN}*[{_LETTER}])*[)\]]?\.?")
_HEAD = re.compile(rf"[(\[]?([{_LETTER}])[)\].、:,](?!\w*[{_LETTER}]\b)|[(\[]([{_LETTER}])[)\]]")
_ANOTHER = re.compile(rf"(?:\bor\b|\band\b|或|和|与|及|[;,])\s*[(\[]?([{_LETTER}])[)\].、:]")
_NAMED = rf"(?:\s|is|are|为|是|:|[(\[*])*([{_LETTER}](?:{_JOIN}*[{_LETTER}])*)(?![A-Za-z])"
_CONCLUSION = re.compile(rf"(?:答案|应选|故选|选择|选(?!项)|\b[Aa]nswer){_NAMED}")
_PHRASE = re.compile(rf"(?:选项|\b[Oo]ption|\b[Cc]hoice){_NAMED}")
_PLAIN_HEAD = re.compile(rf"([{_LETTER}])(?:\s*项|\s*是?(?:正确|对)|\s+is\s+(?:correct|right|true|the)\b|\s+[\d.])")
_SMALL_HEAD = re.compile(rf"[(\[]?([{_LETTER.lower()}])[)\]]")
_REJECTED = re.compile(
    rf"(?:\bnot\b|\bexcept\b|\bexcluding\b|\brather than\b|\binstead of\b|不是|不选|而非|排除|除了?)\s*"
    rf"(?:[Oo]ptions?|[Cc]hoices?|选项)?\s*"
    rf"[(\[]?[{_LETTER}](?![A-Za-z])[)\]]?|(?<![A-Za-z])[(\[]?[{_LETTER}][)\]]?\s*(?:项|选项)?\s*"
    r"(?:(?:is|are)\s+(?:not|wrong|incorrect|false|excluded)\b|不(?:对|正确|成立|符合)|错)"
)
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|rm|bf|quad)\b|[${}*\\]")


def final_answer(text: str) -> str | None:
    """The text of the last answer block behind the thinking, complete or not; else the last \\boxed{…} there; else the last line.
    None where nothing of this stands in `text` (prefill and response), or where it ends inside its thinking.

    For models and outputs that do not keep to the R1 form. The paper compares with models that were never trained in it, so its
    correctness cannot depend on it either.
    """
    before, closed, behind = text.rpartition("</think>")
    if "<think>" in behind or ("<think>" in text and not closed):
        return None
    if closed and "<think>" not in before and not behind.strip():
        behind = before  # no thinking was opened: what was written before its end is the output
    blocks = [block.strip() for block in _BLOCK.findall(behind)]
    if blocks and blocks[-1]:
        return blocks[-1]
    boxed = last_boxed(behind)
    if boxed:
        return boxed
    lines = [line.strip() for line in behind.splitlines() if line.strip()]
    return lines[-1] if lines else None


def chosen_letters(answer: str) -> frozenset[str] | None:
    """The options that an answer names: "B", "(b)", "B. 3 cm", "\\boxed{\\text{B}}", "故选：B", "the answer is (B)", "A、C". All
    of them, so that one who hedges ("A or B") is not right; none that it rejects ("not option A"). None where it names none
    plainly ("A triangle")."""
    plain = unicodedata.normalize("NFKC", answer)
    plain = " ".join(_LATEX.sub(" ", plain).replace("。", ".").split())
    if len(plain.strip("()[]. ")) == 1:
        plain = plain.upper()
    if _ALONE.fullmatch(plain):
        return frozenset(re.findall(f"[{_LETTER}]", plain))
    plain = _REJECTED.sub(" ", plain).strip()
    if concluded := _CONCLUSION.findall(plain):
        return frozenset(re.findall(f"[{_LETTER}]", concluded[-1]))
    if head := _HEAD.match(plain):
        return frozenset([head[1] or head[2], *_ANOTHER.findall(plain, head.end())])
    if named := _PHRASE.findall(plain):
        return frozenset(re.findall(f"[{_LETTER}]", named[-1]))
    if head := _PLAIN_HEAD.match(plain) or _SMALL_HEAD.match(plain):
        return frozenset(head[1].upper())
    return None
