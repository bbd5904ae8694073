"""Entry noise: what typing, copying and converting leave in a question that people entered by hand.

`clean` is idempotent. It mends what has one reading, flags what needs a person or a judge, and turns away what cannot be
trained on as text. Each rule looks first, cheaply, for what it begins with, so that a clean set costs little.

| noise | done |
|---|---|
| LaTeX whose backslash was eaten as an escape (form feed + "rac"), or doubled ("\\\\\\\\frac") | mended |
| a math segment that lacks one closing brace | mended |
| \\left { in front of an environment | \\left\\{ |
| braces or \\left … \\right that do not pair otherwise | flag `broken_latex` |
| HTML tags and entities; <sub>, <sup> | taken out; _{…}, ^{…} |
| <img> | turned away: the question cannot be read without it |
| UTF-8 read as Latin-1 or GBK | mended (ftfy; round trip through GB18030) |
| U+FFFD, 锟斤拷 | turned away: the characters are lost |
| zero-width and control characters, odd spaces | taken out |
| number and points in front ("13. (5 分)") | taken out |
| the answer behind the question (【答案】…, "Answer: 42"), a filled-in blank | taken out, flag `answer_in_question` |
| several sub-questions in one ((1) … (2) …) | flag `subquestions`: only a judge can tell |
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

import ftfy

_BLOCK = r"br|p|div|span|em|strong|font|sub|sup|table|tbody|tr|td|th|li|ul|ol|center|html|body|h[1-6]|section|label|style"
_ATTRIBUTES = r"(?:\s+[a-zA-Z][\w:-]*\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s<>\"']+))*"
_TAG = re.compile(rf"</?(?:{_BLOCK}){_ATTRIBUTES}\s*/?>", re.IGNORECASE)
_PAIRED = re.compile(rf"<([biua]){_ATTRIBUTES}>([^<]*)</\1>", re.IGNORECASE)
_IMAGE = re.compile(rf"<img{_ATTRIBUTES}\s*/?>|!\[[^\]]*\]\([^)]*\)", re.IGNORECASE)
_BREAK = re.compile(rf"<(?:br|/p|/div|/tr|/li|/h[1-6]){_ATTRIBUTES}\s*/?>", re.IGNORECASE)
_SCRIPT = re.compile(r"<(su[bp])>([^<]{1,40})</\1>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{1,6}|#[xX][0-9a-fA-F]{1,6});")
_EATEN = (
    (re.compile(r"\f(?=rac|orall|loor|box)"), r"\\f"),
    (re.compile(r"\t(?=imes|ext|frac|heta|an(?![a-z])|riangle|o(?![a-z])|au(?![a-z]))"), r"\\t"),
    (re.compile("\x08(?=eta|ar(?![a-z])|egin|inom|oxed|ig|ullet)"), r"\\b"),
    (re.compile(r"\r(?=ight|ho(?![a-z])|angle|ightarrow)"), r"\\r"),
    (re.compile(r"\v(?=ec(?![a-z])|ert)"), r"\\v"),
    (re.compile(r"\a(?=lpha|ngle|pprox|st(?![a-z]))"), r"\\a"),
)
_DOUBLED = re.compile(
    r"\\\\(?=(?:frac|sqrt|times|left|right|cdot|leq|geq|pi|alpha|beta|theta|triangle|angle|text|mathrm|sin|cos|tan|log|div)(?![a-zA-Z]))"
)
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u205f]")
_LOST = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯")
_LATIN = re.compile("[ÃÂâï][\x80-\xbf\u20ac\u0152-\u0178\u2013-\u203a]|â€")
_HAN = re.compile("[\u4e00-\u9fff]")
_NUMBERING = re.compile(r"^\s*(?:【[^】\n]{0,40}题】|\d{1,3}\s*[.．、](?!\d)\s*(?=\S)|(?:例|第)\s*\d{1,3}\s*题?\s*[.．、:：]?)")
_POINTS = re.compile(r"^\s*[(（]\s*(?:本(?:小)?题(?:满分)?)?\s*(?:共)?\s*\d{1,3}\s*分\s*[)）]\s*")
_TAIL = re.compile(
    r"(?:【\s*(?:答案|解析|分析|详解|解答|点评)\s*】|(?<![\w\u4e00-\u9fff])(?:参考答案|正确答案|答案|故选|解析)\s*(?:是|为)?\s*[:：]"
    r"|(?<![A-Za-z])(?:[Cc]orrect )?[Aa]nswer\s*[:：]|(?<![A-Za-z])ANSWER\s*[:：]|(?<![A-Za-z])[Ss]olution\s*[:：])"
)
_FILLED_CHOICE = re.compile(r"([(（])\s*([A-H])\s*([)）])(?=\s*[.。．]?\s*(?:\n|$))")
_SUBQUESTION = re.compile(
    r"(?:^|[\n。．；;.!?？！：:])\s*(?:[(（]\s*([1-9]|[a-h]|i{1,3}|iv|v)\s*[)）]|([①-⑨])|([1-9])\s*[)）]\s)"
)
_ASKS = re.compile(
    r"求|多少|几|计算|证明|判断|为什么|写出|画出|说明|是否|吗|[?？]|\b(?:find|compute|determine|what|how|prove|show|evaluate|solve|write|calculate)\b",
    re.IGNORECASE,
)
_LEFT_BRACE = re.compile(r"\\left\s*\{(?=\s*\\begin)")
_SEGMENT = re.compile(r"(?<!\\)(\$\$?)([^$]+)(\1)")
_ORDINALS = {**{character: index + 1 for index, character in enumerate("abcdefgh")}, "i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]|\t(?=[a-z])")
_HEADINGS = ("nswer", "NSWER", "olution", "答案", "故选", "解析", "分析", "详解", "解答", "点评")
_SECONDS = ("(2)", "（2）", "(2）", "②", "(b)", "（b）", "(ii)", "（ii）", "2)", "2）")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """reject: why the row cannot be used, or ""."""

    question: str
    answer: str | None
    flags: tuple[str, ...] = ()
    reject: str = ""


def clean(question: str, answer: str | None) -> Cleaned:
    """The question and the answer without entry noise, as the module's table says. Pure; never raises for any text."""
    flags: set[str] = set()
    for _ in range(4):  # a mended text may show the next noise (an entity inside an entity); four are more than were ever seen
        before = question
        question = _markup(_characters(question, flags), flags)
        question = _latex(_numbering(question), flags)
        question = _answer_inside(question, answer, flags)
        if question == before:
            break
    question = _tidy(question)
    if answer is not None:
        answer = _tidy(_latex(_markup(_characters(answer, flags), flags), flags))
    reject = ""
    if _LOST.search(question) or (answer and _LOST.search(answer)):
        reject = "characters are lost (U+FFFD, 锟斤拷); take the text from its source again"
    elif "image" in flags:
        reject = "needs an image; describe it in words, or leave the row out"
    elif not question:
        reject = "nothing is left of the question without its entry noise; enter it again"
    if has_subquestions(question):
        flags.add("subquestions")
    return Cleaned(question, answer, tuple(sorted(flags - {"image"})), reject)


def _tidy(text: str) -> str:
    if "\n" not in text and "\r" not in text:
        return text.strip()
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _characters(text: str, flags: set[str]) -> str:
    if text.isascii() and not _CONTROL.search(text):
        return text
    mended = text
    for pattern, backslashed in _EATEN:
        mended = pattern.sub(backslashed, mended)
    if _LATIN.search(mended):
        mended = ftfy.fix_encoding(mended)
    if _HAN.search(mended):
        mended = _from_gbk(mended)
    if mended != text:
        flags.add("mended_characters")
    mended = _SPACES.sub(" ", mended.replace("\r\n", "\n"))
    return _INVISIBLE.sub("", mended.replace("\r", "\n"))


def _from_gbk(text: str) -> str:
    """UTF-8 that was read as GBK (浣犲ソ for 你好). Chinese text that is by chance UTF-8 once encoded as GB18030 does not
    occur: each of its characters would have to open or continue a UTF-8 sequence in step."""
    try:
        mended = text.encode("gb18030").decode()
    except UnicodeError:
        return text
    return mended if len(_HAN.findall(text)) >= 2 and _HAN.search(mended) else text


def _markup(text: str, flags: set[str]) -> str:
    if "&" in text and _ENTITY.search(text):
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        flags.add("html")
    if "![" not in text and ("<" not in text or not re.search(r"<[a-zA-Z/]", text)):
        return text
    if _IMAGE.search(text):
        flags.add("image")
    bare = _SCRIPT.sub(lambda match: ("_" if match[1].lower() == "sub" else "^") + "{" + match[2] + "}", text)
    bare = _TAG.sub("", _PAIRED.sub(r"\2", _BREAK.sub("\n", bare)))
    if bare != text:
        flags.add("html")
    return bare


def _latex(text: str, flags: set[str]) -> str:
    if "\\" not in text and "{" not in text and "}" not in text:
        return text
    mended = text
    if "\\\\" in text and "\\begin" not in text:  # in an environment a double backslash ends a line
        mended = _DOUBLED.sub(r"\\", mended)
    if "\\left" in text:
        mended = _LEFT_BRACE.sub(r"\\left\\{", mended)
    if _excess(mended) == 1:
        closed = _SEGMENT.sub(_close_brace, mended)
        mended = closed if _excess(closed) == 0 else mended
    if mended != text:
        flags.add("mended_latex")
    flags.discard("broken_latex")
    if _excess(mended) != 0 or _fences(mended) != 0:
        flags.add("broken_latex")
    return mended


def _excess(text: str) -> int:
    """Opening braces beyond closing ones, escaped ones left aside."""
    if text.count("{") == text.count("}") and text.count("\\{") == text.count("\\}"):
        return 0
    bare = re.sub(r"\\\\|\\[{}]", "", text)
    return bare.count("{") - bare.count("}")


def _fences(text: str) -> int:
    """\\left beyond \\right; arrows left aside."""
    if text.count("\\left") == text.count("\\right"):
        return 0
    return len(re.findall(r"\\left(?![a-zA-Z])", text)) - len(re.findall(r"\\right(?![a-zA-Z])", text))


def _close_brace(match: re.Match[str]) -> str:
    opened, content, closed = match.groups()
    return f"{opened}{content}}}{closed}" if _excess(content) == 1 and not content.endswith("\\") else match[0]


def _numbering(text: str) -> str:
    """A number in front belongs to the sheet it came from. Only in Chinese text: "3. 5 …" in English may be the question
    itself."""
    if not _HAN.search(text):
        return text
    bare = _POINTS.sub("", _NUMBERING.sub("", text, count=1), count=1)
    return bare if len(bare.strip()) >= 5 else text


def _answer_inside(text: str, answer: str | None, flags: set[str]) -> str:
    """Cut what follows an answer's heading, if a question stands before it; empty a blank that the answer fills."""
    tail = _TAIL.search(text) if any(heading in text for heading in _HEADINGS) else None
    if tail and len(text[: tail.start()].strip()) >= 5:
        after = _bare(text[tail.end() :])
        if "【" in tail[0] or (answer is not None and _bare(answer) and after.startswith(_bare(answer))):
            flags.add("answer_in_question")
            text = text[: tail.start()].rstrip()
    if answer is None or not answer.strip():
        return text
    filled = text
    if len(answer.strip()) == 1:
        filled = _FILLED_CHOICE.sub(lambda match: f"{match[1]} {match[3]}" if match[2] == answer.strip() else match[0], text)
    if "_" in text and len(answer) <= 40:
        filled = re.sub(r"_+[ ]*" + re.escape(answer.strip()) + r"[ ]*_+", "____", filled)
    if filled != text:
        flags.add("answer_in_question")
    return filled


def _bare(text: str) -> str:
    return re.sub(r"[\s$。.,，、:：{}]|\\boxed", "", text)


def has_subquestions(text: str) -> bool:
    """Two or more numbered parts, in order from the first, of which at least two ask something ("(1) 求 a; (2) 求 b")."""
    if not any(second in text for second in _SECONDS):
        return False
    parts: list[tuple[int, int]] = []
    for match in _SUBQUESTION.finditer(text):
        mark = next(group for group in match.groups() if group)
        number = "①②③④⑤⑥⑦⑧⑨".find(mark) + 1 or (int(mark) if mark.isdigit() else _ORDINALS.get(mark, 0))
        if number == len(parts) + 1:
            parts.append((match.end(), match.start()))
    if len(parts) < 2:
        return False
    ends = [start for _, start in parts[1:]] + [len(text)]
    asking = [bool(_ASKS.search(text, begin, end)) for (begin, _), end in zip(parts, ends, strict=True)]
    return sum(asking) >= 2
