r"""The structure of an answer: blanks, lists, points, intervals, sets, and single values with name and unit.

    blanks    a；b         each in its place
    list      a, b or c    in any order (`match` says when in the order given)
    point     (a, b)       in order; also an open interval, which nothing in the text tells from it
    interval  [a, b)       x ≥ a and \{x | x ≥ a\} are read as the interval they describe
    set       \{a, b\}     in any order; no point
    units     3小时20分, 1 h 30 min, 2024年5月1日: in order
    remainder 7余2, 7 R 2
    value     a formula, with its name (`x =`), unit and per cent sign apart

Of a commanding prose ("the answer is 5 cm") the last statement is read. Candidates stay a list, whoever lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rollout.reward.answers import text as text_form
from rollout.reward.answers.numbers import Number, number
from rollout.reward.answers.phrases import DENIES, HEDGES, is_noun
from rollout.reward.answers.units import UNITS, split_unit


@dataclass(frozen=True, slots=True)
class Value:
    """One formula. text: cleaned LaTeX without name and unit. unit: "" where none is given, or a word that is no unit (apples).
    product: the unit may as well be a variable (`5m`, `5 m`). spaced: a space or parentheses set it apart. whole: the text
    before anything was taken off."""

    text: str
    unit: str = ""
    name: str = ""
    whole: str = ""
    product: bool = False
    number: Number | None = None
    spaced: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    r"""Several parts. brackets: "" list, "or" list of candidates joined by or, ";" blanks, "{}" set, "units" quantity of
    several units or a date, "remainder" quotient and remainder, else the two brackets."""

    brackets: str
    parts: tuple[Node, ...]
    name: str = ""
    whole: str = ""


Node = Value | Group

_OPEN, _CLOSE = "([{", ")]}"
_OR = re.compile(r"\s+or\s+|\bor\b|或者?|\\(?:lor|vee)(?![a-z])")
_AND = re.compile(r"(?:,\s*)?(?:(?<![a-zA-Z\\])and(?![a-zA-Z])|[和与及且])(?:\s*,)?|(?<=\})\s*\\text\{\s*[;,]\s*\}")
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")
_NAME = re.compile(
    r"(?:\\?[a-zA-Z]+|\\text\{[^{}]*\}|[\u4e00-\u9fff∠△]+|\\(?:angle|triangle)\s*[A-Z]+|\|[^|=]+\||\\overline\{?[A-Z]+\}?|"
    r"\\frac\{d\s*\\?[a-zA-Z]+\}\{d\s*[a-z]\}|\((?:\s*\\?[a-zA-Z]+(?:_\{?\w+\}?)?\s*,?)+\))(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*(?:\s*\([^()]*\))?(?:\s*\^\s*\{?[23*]\}?)?"
)
_RELATION = r"(<|\\le(?![a-zA-Z])|>|\\ge(?![a-zA-Z]))"
_VARIABLE = r"\s*(\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*"
_BETWEEN = re.compile(rf"([^<>=]+?){_RELATION}{_VARIABLE}{_RELATION}([^<>=]+)")
_BOUND = re.compile(rf"{_VARIABLE}{_RELATION}([^<>=]+)")
_BOUND_BEFORE = re.compile(rf"([^<>=]+?){_RELATION}{_VARIABLE}")
_BUILDER = re.compile(
    r"\\?\{\s*(?P<name>\\?[a-zA-Z]+)\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)\s*(?P<body>.+?)\\?\}", re.DOTALL
)
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_LEAD = re.compile(
    r"^.*(?:\b(?:is|are|equals?|was|be|get|have|answer|has)\b|[:：](?!\d)|[为是得答]|等于|(?:共|有|需)(?=\s*[\d$]))\s*:?\s*",
    re.DOTALL | re.IGNORECASE,
)
_OPENERS = re.compile(
    r"^(?:(?:(?:so|thus|hence|therefore|yes|no|answer|about|approximately|exactly)\b|解|答|故|所以|约为|约|共)[\s,:]*)+",
    re.IGNORECASE,
)
_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arc\w{3}|sinh|cosh|tanh|log|ln|lg|exp|sqrt|max|min|gcd|lcm|mod|pi|inf|lim|det"
_CODE = re.compile(r"\\[a-zA-Z]+|\\.")
_WORD = re.compile(rf"(?<![a-zA-Z])(?!(?:{_FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]{{3,}}|[\u4e00-\u9fff]")
_LABELS = re.compile(r"(?:\(\d\)\s*)+|(?:\\textcircled\{\d+\}[,\s]*)+")
"""(2)(3) and ②③: the numbers of statements, and no product."""
_COUNTED = re.compile(r"(?P<value>-?[\d.,/ ]*\d|.*[\d}])\s*(?P<noun>[A-Za-z][A-Za-z' -]*|[\u4e00-\u9fff]+)")
_QUANTITY = r"(\d+(?:\.\d+)?)\s*([A-Za-z]+|[\u4e00-\u9fff]+)\s*"
_QUANTITIES = re.compile(rf"(?:{_QUANTITY}){{2,}}")
_REMAINDER = re.compile(r"(\d+)\s*(?:余|[Rr]|remainder|(?:\\ldots\s*){1,2})\s*(\d+)")
_NO_NAME = re.compile(r"\\(?:not|neg|lnot|ne|to|in|le|ge|pm|mp|approx)(?![a-zA-Z])|(?!.*[A-Z]{2}).*\^")
"""x^2 = 7 is no statement of 7; BC^2 = 19 names the square of a length."""
_FIGURE = r"[$]?-?\d+(?:[.,/]\d+)*%?"
_CANDIDATES = re.compile(
    rf"{_FIGURE}(?:\s*[A-Za-z\u4e00-\u9fff]{{1,10}}?)?(?:[\s,;(]*(?:,|;|\b(?:or|and|to|maybe|perhaps|possibly|alternatively)\b|或者?|可能|[和与到至~])+"
    rf"[\s,(]*(?:x|maybe|perhaps|possibly|it is)?\s*=?\s*{_FIGURE}(?:\s*[A-Za-z\u4e00-\u9fff]{{1,10}}?)?)+(?=\D*$)"
)


def read(text: str) -> tuple[Node, ...]:
    """What the text says; more than one node where commas leave it open (1,000,2,000 or 1,22). Empty for prose in which it cannot
    be told."""
    inner = text_form.unwrap(re.sub(r"\*\*(?=\S)|(?<=\S)\*\*|`", "", text))
    if inner is None:
        return ()
    formula = text_form.clean(text_form.without_font(inner.strip())).strip().rstrip(".").strip()
    formula = re.sub(r"^\$(?=[^\d.])|(?<![\d}])\$$", "", formula).strip()
    if not formula:
        return ()
    statement = _statement(formula)
    if statement is None:
        return ()
    if _is_words(statement):
        return (Value(statement, whole=statement),)
    nodes = [_blanks(statement, True)]
    if _THOUSANDS.search(statement) or (number(statement) is not None and "," in statement):
        if not re.search(r"(?<![\d.])0\d", statement):  # 10,080 is no list with 080
            nodes.append(_blanks(statement, False))
        if number(statement) is not None:
            nodes.insert(0, _value(statement))
    return tuple(dict.fromkeys(nodes))


def words(text: str) -> str:
    """The letters of a worded answer: without \\text, marks and spaces, in lower case."""
    return re.sub(r"\\text|\\[a-z]+|[\s{}()$.,!'\"-]", "", text).casefold()


def _is_words(formula: str) -> bool:
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", formula)
    return (
        not re.search(r"[\d\\^_=<>+*/|;]", bare)
        and bool(_WORD.search(bare))
        and number(formula) is None
        and not _names_numbers(bare)
    )


def _names_numbers(bare: str) -> bool:
    """三或五, 三分之一米: Chinese numerals with a unit."""
    value, unit, _ = split_unit(bare)
    return (bool(unit) and number(value) is not None) or all(number(part) is not None for part in re.split("[,或和]", bare))


def _statement(formula: str) -> str | None:
    """The formula itself, or what prose around it states last; None where that cannot be told."""
    if _is_words(formula) or _is_formula(formula):
        return formula
    shorter = _OPENERS.sub("", re.sub(r"^\\text\{\s*(?:Yes|No|Thus|So)\s*,?\s*\}\s*,?", "", formula)).strip()
    if shorter and _is_formula(shorter):
        return shorter
    if (found := _LEAD.match(formula)) is not None and not (DENIES.search(found[0]) or HEDGES.search(found[0])):
        rest = _OPENERS.sub("", formula[found.end() :]).strip().strip("*").strip()
        if rest and "$" not in rest and (_is_formula(rest) or _is_words(rest)):
            return rest
    if (found := _CANDIDATES.search(formula)) is not None and "\\" not in formula and not DENIES.search(formula):
        return re.sub(r"[(]|\b(?:to|maybe|perhaps|possibly|alternatively)\b|[可能到至~]+", ",", found[0])
    return None


def _is_formula(formula: str) -> bool:
    """Mathematics, its units and the nouns that are counted; no sentence."""
    for part in split(formula, ";") if ";" in formula else [formula]:
        for item in re.split(_OR, part):
            for single in _AND.split(item):
                if single and not _is_item(single.strip()):
                    return False
    return True


def _is_item(text: str) -> bool:
    body = _after_name(text)[1]
    if _quantities(body) or _REMAINDER.fullmatch(body):
        return True
    value, _, _ = split_unit(body)
    bare = _CODE.sub(" ", re.sub(r"\\text\{[^{}]*\}|_\{[^{}]*\}", " ", value))
    bare = re.sub(r"\\begin\{\w+\}|\\end\{\w+\}|\\mathbb\{\w\}|(?:begin|end)?\{[a-z]*matrix\}|\{array\}(\{[clr|]+\})?", " ", bare)
    if not _WORD.search(bare) or number(value) is not None:
        return True
    counted = _COUNTED.fullmatch(value)
    if counted is None or not is_noun(counted["noun"]) or len(counted["noun"]) > 24 or len(counted["noun"].split()) > 3:
        return False
    return not _WORD.search(_CODE.sub(" ", re.sub(r"\\text\{[^{}]*\}", " ", counted["value"])))


def split(text: str, separators: str) -> list[str]:
    """Split at one-character separators outside all brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if place and text[place - 1] == "\\" and character not in "{}":
            continue
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character in separators and depth <= 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def _split_at(pattern: re.Pattern[str], text: str) -> list[str]:
    """Split at a pattern outside all brackets."""
    parts, start = [], 0
    for found in pattern.finditer(text):
        before = text[: found.start()]
        if sum(map(before.count, _OPEN)) == sum(map(before.count, _CLOSE)) and not re.search(r"\\text\{[^{}]*$", before):
            parts.append(text[start : found.start()])
            start = found.end()
    return [part.strip() for part in [*parts, text[start:]]]


def _blanks(text: str, thousands: bool) -> Node:
    parts = [part for part in split(text, ";") if part]
    if len(parts) > 1:
        return Group(";", tuple(_list(re.sub(r"^\(\d\)\.?(?=.)", "", part).strip(), thousands) for part in parts), whole=text)
    return _list(parts[0] if parts else text, thousands)


def _list(text: str, thousands: bool) -> Node:
    if "\\begin" in text:
        return _value(text)
    if _LABELS.fullmatch(text) and len(labels := re.findall(r"\d+", text)) > 1:
        return Group("{}", tuple(Value(rf"\text{{label {label}}}") for label in labels), whole=text)
    candidates = [part.strip(" ,") for part in _split_at(_OR, text)]
    candidates = [part for part in candidates if part]
    parts: list[Node] = []
    for candidate in candidates:
        for joined in _split_at(_AND, candidate):
            for part in _commas(joined, thousands):
                if part:
                    parts.extend(_one(part))
    if len(parts) == 1:
        return parts[0]
    if len(candidates) > 1 and len(parts) == len(candidates) and all(_is_interval(part) and part.name for part in parts):
        pieces = r"\cup ".join(f"{part.brackets[0]}{part.parts[0].text},{part.parts[1].text}{part.brackets[1]}" for part in parts)
        return Value(pieces, name=parts[0].name, whole=text)
    return Group("or" if len(candidates) > 1 else "", _named(tuple(parts)), whole=text)


def _named(parts: tuple[Node, ...]) -> tuple[Node, ...]:
    """x = 1, 2: the name is of all."""
    first = parts[0] if parts else None
    if isinstance(first, Value) and first.name and all(isinstance(part, Value) and not part.name for part in parts[1:]):
        return tuple(replace(part, name="") for part in parts)
    return parts


def _commas(text: str, thousands: bool) -> list[str]:
    if not thousands:
        return split(text, ",")
    kept = _THOUSANDS.sub(lambda found: found[0].replace(",", "\0"), text)
    return [part.replace("\0", ",") for part in split(kept, ",")]


def _is_interval(node: Node) -> bool:
    return isinstance(node, Group) and len(node.brackets) == 2 and node.brackets != "{}" and len(node.parts) == 2


def _one(text: str) -> list[Node]:
    r"""A part of a list: bracketed, a relation, or a value; ± makes two of it."""
    name, body = _after_name(text)
    if (built := _BUILDER.fullmatch(body)) is not None:
        node = _list(built["body"].strip(), True)
        return [replace(node, name=built["name"], whole=text)]
    if (group := _bracketed(body, name, text)) is not None:
        return [group]
    if (interval := _interval(body, text)) is not None:
        return [interval]
    if quantities := _quantities(body):
        return [Group("units", quantities, _short(name), text)]
    if (divided := _REMAINDER.fullmatch(body)) is not None:
        return [Group("remainder", tuple(map(_value, divided.groups())), _short(name), text)]
    if body.count(r"\pm") == 1 and r"\mp" not in body:
        before, _, after = body.partition(r"\pm")
        plus, minus = f"{before}+{after}" if before.strip() else after, f"{before}-{after}"
        return [
            replace(_value(side.strip()), name=_short(name), whole=f"{name}={side}" if name else side) for side in (plus, minus)
        ]
    return [_value(text)]


def _quantities(body: str) -> tuple[Value, ...]:
    """Two or more numbers, each with its unit or its Chinese noun; () for anything else."""
    if _QUANTITIES.fullmatch(body) is None or number(body) is not None:
        return ()
    found = re.findall(_QUANTITY, body)
    units = [UNITS.get(unit, "" if unit.isascii() else unit) for _, unit in found]
    if not all(units) or all(len(unit) == 1 and unit.isascii() for _, unit in found):
        return ()
    if {"h", "s", "day"} & set(units):
        units = ["min" if unit == "fen" else unit for unit in units]
    return tuple(
        Value(value, unit, whole=value + unit, number=number(value)) for (value, _), unit in zip(found, units, strict=True)
    )


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and _NO_NAME.match(text) is None and number(text) is None


def _after_name(text: str) -> tuple[str, str]:
    r"""("x", "5") of `x = 5`, of `x = 2 + 3 = 5`, of `x \in …`; ("", text) where no mere name stands before."""
    if (member := re.match(rf"({_NAME.pattern})\s*\\in(?![a-zA-Z])\s*", text)) is not None:
        return member[1].strip(), text[member.end() :].strip()
    head, *rest = re.split(r"\\approx(?![a-zA-Z])", text)
    sides = split(head, "=")
    if len(sides) == 1 and rest and _is_name(sides[0]):
        sides.append(rest[0].strip())
    if len(sides) > 1 and sides[-1] and _is_name(sides[0]):
        return sides[0], sides[-1]
    if len(sides) == 2 and number(sides[0]) is not None and _is_name(sides[1]):
        return sides[1], sides[0]
    return "", text


def _short(name: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", name)


def _bracketed(body: str, name: str, whole: str) -> Group | None:
    inner = body
    explicit = body.startswith(r"\{") and body.endswith(r"\}")
    if explicit:
        inner = body[1:-2] + "}"
    if len(inner) < 3 or inner[0] not in _OPEN or inner[-1] not in _CLOSE:
        return None
    depth = 0
    for place, character in enumerate(inner):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and place < len(inner) - 1:
            return None
    content = inner[1:-1]
    parts = [part for part in split(content, ",;") if part]
    if inner[0] == "{":
        if not explicit:  # braces that LaTeX only groups with
            node = _list(content, True)
            return replace(node, name=_short(name)) if isinstance(node, Group) else None
        return Group("{}", tuple(node for part in split(content, ",;") if part for node in _one(part)), _short(name), whole)
    if len(parts) < 2:
        return None
    return Group(inner[0] + inner[-1], tuple(_first(_one(part), part) for part in parts), _short(name), whole)


def _first(nodes: list[Node], text: str) -> Node:
    return nodes[0] if len(nodes) == 1 else _value(text)


def _interval(body: str, whole: str) -> Group | None:
    if (found := _BETWEEN.fullmatch(body)) is not None:
        low, left, name, right, high = (group.strip() for group in found.groups())
        if ("<" in left or "le" in left) != ("<" in right or "le" in right):
            return None
        if ">" in left or "ge" in left:
            low, left, right, high = high, right, left, low
        return _ends(low, left, name, right, high, whole)
    if (found := _BOUND.fullmatch(body)) is not None:
        name, sign, end = (group.strip() for group in found.groups())
    elif (found := _BOUND_BEFORE.fullmatch(body)) is not None:
        end, sign, name = (group.strip() for group in found.groups())
        sign = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
    else:
        return None
    if re.search(r"(?<![a-zA-Z\\])" + re.escape(name) + r"(?![a-zA-Z])", end):
        return None
    if sign in ("<", r"\le"):
        return _ends(r"-\infty", "<", name, sign, end, whole)
    return _ends(end, sign.replace(">", "<").replace("ge", "le"), name, "<", r"\infty", whole)


def _ends(low: str, left: str, name: str, right: str, high: str, whole: str) -> Group:
    brackets = ("[" if left.startswith("\\") else "(") + ("]" if right.startswith("\\") else ")")
    return Group(brackets, (_value(low), _value(high)), _short(name), whole)


def _value(text: str) -> Value:
    name, body = _after_name(text)
    value, unit, surely = split_unit(body)
    value = value.strip().rstrip(",").strip() or body
    if unit == "" and number(value) is None and (counted := _COUNTED.fullmatch(value)) is not None:
        noun = counted["noun"]
        if is_noun(noun) and (_WORD.search(noun) or re.search(r"[\u4e00-\u9fff]", noun)) and number(counted["value"]) is not None:
            value = counted["value"].strip()
    spaced = re.search(r"\s[a-zA-Z]$|\([a-zA-Z]\)$", body) is not None
    return Value(value, unit, _short(name), text, bool(unit) and not surely, number(value), spaced)
