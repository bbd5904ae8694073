r"""From a text as a person or a model writes it to plain LaTeX: one way to write each thing, and nothing that is only layout.

The meaning stays; what changes is spelling. `\dfrac`, `\left(`, `\,`, full-width forms, Unicode signs and superscripts, thousands
separators (`10{,}000`, `10,\!080`, `10\,080`), the many ways to set text. Units, names and numbers are read later.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from rollout.reward.answers.units import is_unit

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_SIGNS = {
    "\u3000": " ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "。": ".", "、": ",", "【": "[", "】": "]",
    "−": "-", "–": "-", "—": "-", "﹣": "-", "∶": ":", "∕": "/", "⁄": "/", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ",
    "∙": r"\cdot ", "⋅": r"\cdot ", "±": r"\pm ", "∓": r"\mp ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ",
    "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "′": "'", "’": "'",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "‰": r"\permil ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "√": r"\sqrt ",
    "空集": r"\emptyset ", "无穷大": r"\infty ", "无穷": r"\infty ", "根号": r"\sqrt ",
}  # fmt: skip
_GREEK = dict(
    zip(
        "αβγδεθλμρστφωΔΩ",
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "epsilon",
            "theta",
            "lambda",
            "mu",
            "rho",
            "sigma",
            "tau",
            "phi",
            "omega",
            "Delta",
            "Omega",
        ],
        strict=True,
    )
)
_SIGNS |= {letter: f"\\{name} " for letter, name in _GREEK.items()}
_SIGNS |= {
    "㎝": "cm",
    "㎜": "mm",
    "㎞": "km",
    "㎡": "m^2",
    "㎠": "cm^2",
    "㎥": "m^3",
    "㎏": "kg",
    "㎎": "mg",
    "㎖": "mL",
    "…": r"\ldots ",
}
_INVISIBLE = dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0xFEFF]) | {
    code: " " for code in range(32) if chr(code) not in "\t\n\r"
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CIRCLED = {chr(0x2460 + number): rf"\textcircled{{{number + 1}}}" for number in range(20)}
_ANY_SIGN = re.compile("|".join(map(re.escape, _SIGNS | _CIRCLED)))

_THOUSANDS = re.compile(r"(?<=\d)(?:\\,|\\!|\s?\{,\s?\}\s*(?:\\!)?|,\s*\\!|\\;|\\ )\s*(?=\d{3}(?!\d))")
_TEXT = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|operatorname|bm|boldsymbol|rm)\s*\*?\s*\{"
)
_CODES = (
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])|\\(?:left|right)(?![a-zA-Z])\.?|\\(?:display|text|script)style|\\limits"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leq|le|leqq)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge|geqq)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:neq|ne)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\(?:thickapprox|approx|doteq|simeq)(?![a-zA-Z])|~="), r"\\approx "),
    (re.compile(r"\\(?:lbrace|lbrack)(?![a-zA-Z])"), lambda found: r"\{" if "brace" in found[0] else "["),
    (re.compile(r"\\(?:rbrace|rbrack)(?![a-zA-Z])"), lambda found: r"\}" if "brace" in found[0] else "]"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:varnothing|O(?=\s*$))(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)\\[,!;:> ]|~"), " "),
    (re.compile(r"(?<![\d.])\+\s*\\infty"), r"\\infty"),
    (re.compile(r"\\text\{[\s,(]*(?:maybe\s+)?(or|and)[\s,(]*\}"), r" \1 "),
    (re.compile(r"\\text\{\s*([或和与及且])\s*\}"), r"\1"),
    (re.compile(r"_\s*\{?\s*\\text\{([^{}]*)\}\s*\}?"), lambda found: "_{" + found[1].replace(" ", "") + "}"),
    (re.compile(r"_\s*\{?\s*\\(odot|oplus|star|ast|dagger|perp|parallel|infty)(?![a-zA-Z])\s*\}?"), r"_{\1}"),
    (re.compile(r"\{,\s?\}"), ","),
    (re.compile(r"\.{3}|\\(?:cdots|dots)(?![a-zA-Z])"), r"\\ldots "),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\^\s*\{?\s*\\prime(?![a-zA-Z])\s*\}?"), "'"),
    (re.compile(r"\s+"), " "),
)
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "打": 12,
    "half": Fraction(1, 2),
} | {
    name: Fraction(1, parts)
    for name, parts in zip(
        ("third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "hundredth", "thousandth"),
        (3, 4, 4, 5, 6, 7, 8, 9, 10, 100, 1000),
        strict=True,
    )
}
_SCALE = rf"(?:(?:{'|'.join(_SCALES)}|halve)s?(?![a-z])|打)"
_SCALED = re.compile(
    rf"(?<![\d.,}}^_/])(\d+(?:\.\d+)?)\s*(?:\\text\{{\s*)?((?:{_SCALE}\s*){{1,2}})(?:\}}|(?<=\s)|(?![\w}}]))", re.IGNORECASE
)
_HALF_MORE = re.compile(r"(?<![\d.,/])(\d+) and a half(?![a-z])")
_ROOT = re.compile(r"\\sqrt\s*(\d+(?:\.\d+)?|[a-z](?![a-z]))")
_ROOT_OF = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_BARE_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt(?=\s*[\d({])")
_BARE_PI = re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])")
_DELIMITERS = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|(?<!\\)\\\((.+?)(?<!\\)\\\)|(?<!\\)\\\[(?!\d*(?:pt|em|ex|mm)\])(.+?)(?<!\\)\\\]",
    re.DOTALL,
)
_VALUE = re.compile(r"[-+−–$(\\.\d]")
_BOX = re.compile(r"\\[f]?boxed\s*\{|\\fbox\s*\{")
_JOINT = re.compile(
    r"\s*(?:[,;，；、/]|\\text\{\s*(?:and|or)\s*\}|and|or|或者?|和|与|及|(?:\\quad|\\,|\\;|\\ )+)?\s*", re.IGNORECASE
)
_JOINTS = re.compile(rf"(?:{_JOINT.pattern}){{1,4}}", re.IGNORECASE)


def clean(text: str) -> str:
    """Plain LaTeX of one formula, without delimiters."""
    text = _THOUSANDS.sub("", text.translate(_INVISIBLE).translate(_FULL_WIDTH))
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)
    text = _ANY_SIGN.sub(lambda found: _SIGNS.get(found[0]) if found[0] in _SIGNS else _CIRCLED[found[0]], text)
    text = _TEXT.sub(r"\\text{", text)
    text = re.sub(r"\\text\{([A-Za-z])\}", _letter, text)
    for pattern, replacement in _CODES:
        text = pattern.sub(replacement, text)
    text = _BARE_PI.sub(r"\\pi ", _BARE_ROOT.sub(r"\\sqrt", text))
    text = _ROOT_OF.sub(r"\\sqrt{\1}", _ROOT.sub(r"\\sqrt{\1}", text))
    text = _HALF_MORE.sub(lambda found: f"{found[1]}.5", text.strip())
    return _SCALED.sub(_scaled, text).strip()


def _scaled(found: re.Match[str]) -> str:
    """5 million is 5000000, 5 halves are 5/2."""
    value = Fraction(found[1])
    for word in re.findall(r"[a-z]+|打", found[2].lower()):
        value *= _SCALES[word.removesuffix("s")] if word != "halves" else Fraction(1, 2)
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _letter(found: re.Match[str]) -> str:
    r"""\mathrm{i}, \mathrm{e} are letters of the formula; a letter after a number and a space is a unit."""
    before = found.string[: found.start()].rstrip()
    spaced = len(before) < found.start() or before.endswith(("\\,", "\\ ", "~", "\\;"))
    return (
        found[0] if spaced and before and (before[-1].isdigit() or before[-1] in "}\\,~;") and found[1] not in "ie" else found[1]
    )


def unwrap(text: str) -> str | None:
    r"""The formula (or bare text) that the whole text amounts to: what stands in its only \boxed{} or between its only
    delimiters, with a short tail (a unit, a per cent sign); several boxes or formulas joined by commas, `and`, `or` become a
    list. None for prose around several formulas, where only a reader, or the library, can say which is meant."""
    text = text.strip()
    if found := boxes(text):
        between = [text[end:start] for (_, end, _), (start, _, _) in itertools.pairwise(found)]
        contents = [content for _, _, content in found]
        if len(set(contents)) > 1 and not all(_JOINTS.fullmatch(_outside(gap)) for gap in between):
            return None
        joined = contents[0] if len(set(contents)) == 1 else " , ".join(contents)
        return joined + _tail(text[found[-1][1] :])
    found = list(_DELIMITERS.finditer(text))
    if not found:
        return text
    contents = [next(group for group in match.groups() if group is not None) for match in found]
    between = [text[left.end() : right.start()] for left, right in itertools.pairwise(found)]
    if not all(_JOINTS.fullmatch(gap) for gap in between):
        return None
    before, after = text[: found[0].start()].strip(), text[found[-1].end() :]
    if before and re.search(r"\d|\\[a-zA-Z(\[]|\$", before):
        joint = re.fullmatch(rf"([^a-zA-Z\u4e00-\u9fff]*){_JOINT.pattern}", before)
        if joint is None:
            return None
        contents, between = [before, *contents], ["", *between]
        before = ""
    joined = contents[0]
    for gap, content in zip(between, contents[1:], strict=True):
        separator = ";" if re.search("[;；]", gap) else "or" if re.search("或|or", gap) else ","
        joined += f" {separator} {content}"
    rest = after.strip().strip(".。,，!！")
    if rest and re.search(r"\d|\\[a-zA-Z]|\$", rest) and not _tail(after):
        joint = _JOINTS.match(after)
        return joined + after if joint and joint[0].strip() else None
    return joined + _tail(after)


def _outside(gap: str) -> str:
    return re.sub(r"\\[()\[\]]|\$|\.", "", gap)


def _tail(after: str) -> str:
    """A unit or per cent sign after the delimiters; other words are none."""
    rest = re.sub(r"^(?:\\\)|\\\]|[$.\s])+|(?:\\\)|\\\]|[$.。!！\s])+$", "", after)
    return f" {rest}" if rest and is_unit(clean(rest)) else ""


def without_font(text: str) -> str:
    r"""72 of \mathbf{72}: what a font is set around, where that is the whole text and a value. Words keep theirs: \text{cat} is
    no product."""
    for _ in range(3):
        font = _TEXT.match(text)
        if font is None or _closes(text, font.end()) != len(text):
            return text
        inner = text[font.end() : -1].strip()
        if _TEXT.match(inner) is None and not (re.search(r"\d", inner) and (_VALUE.match(inner) or "=" in inner)):
            return text
        text = inner
    return text


def _closes(text: str, start: int) -> int:
    """The place behind the brace that closes the one before start; -1 where none does."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place + 1
    return -1


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each outermost \boxed{} whose braces match."""
    found, position = [], 0
    while match := _BOX.search(text, position):
        position = match.end()
        if (end := _closes(text, position)) != -1:
            found.append((match.start(), end, text[position : end - 1].strip()))
            position = end
    return found
