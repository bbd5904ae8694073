"""Where the public sets keep their questions and answers: one FieldMap a set, found by the columns that only that set has.

A path walks into a row: `reward_model.ground_truth`, `prompt.0.content`; `@user` and `@assistant` pick a turn out of a
conversation, whatever it calls its keys (role/content, from/value).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from curation import answers
from curation.errors import InputError, shown

TEXT_LIMIT = 100_000
"""Characters; a longer question or answer is no question but a file that lost its line ends."""

_INSTRUCTION = re.compile(
    r"\s*(?:Let'?s think step by step and output the final answer (?:within|in) \\boxed\{\s*\}"
    r"|Please reason step by step,? and put your final answer (?:within|in) \\boxed\{\s*\}"
    r"|请(?:你)?(?:一步步|逐步)(?:地)?(?:推理|思考)[^\n]{0,20}\\boxed\{\s*\}(?:中|内|里)?)\s*[.。]?\s*$",
    re.IGNORECASE,
)
_SYNTHETIC = frozenset(("synthetic_math", "synthetic_amc", "orca_math", "metamath", "gsm8k_rephrased", "openmathinstruct"))
_LETTERS = re.compile(r"[A-H](?:\s*[,，、;；]?\s*[A-H])*")


class BadRow(Exception):
    """A row that goes to the quarantine. field, value and reason are its words there; field is "row" where none could be read."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        super().__init__(reason if field == "row" else f"field {field}: {shown(value)} {reason}")
        self.field, self.value, self.reason = field, shown(value), reason


@dataclass(frozen=True, slots=True)
class Found:
    """What a row says, as texts. answer is None where the set has none; options are joined, one a line, "" without."""

    question: str
    answer: str | None
    options: str = ""
    solution: str | None = None
    kind: str = ""
    """choice, proof, or "" where the set does not say."""
    unfit: str = ""
    """synthetic, invalid, other_subject, or "": why the set itself says that the row is no real question with a true answer."""


@dataclass(frozen=True, slots=True)
class FieldMap:
    """question and answer: paths, the first that leads to something counts. needs: columns that must all be there for the map
    to be chosen by itself. named: the map's name is the source's label (else the file's)."""

    name: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    needs: tuple[str, ...] = ()
    extract: Callable[[str], str | None] | None = None
    options: str = ""
    solution: str = ""
    marks: Callable[[dict[str, Any]], tuple[str, str]] | None = None
    named: bool = True

    def columns(self) -> set[str] | None:
        """The top-level columns that the map may touch; None for all of them."""
        if self.marks is not None:
            return None
        return {path.split(".")[0] for path in (*self.question, *self.answer, self.options, self.solution) if path}

    def read(self, row: Any) -> Found:
        """Raises BadRow where the question is missing, or a value is of a kind that is neither text nor number."""
        question = as_text("question", first(row, self.question), self.question)
        if question is None or not question.strip():
            raise BadRow("question", question, f"is missing or blank; the map looks at {' or '.join(self.question)}")
        answer = as_text("answer", first(row, self.answer), self.answer)
        if answer is not None and self.extract is not None:
            answer = self.extract(answer)
        options = as_options(first(row, (self.options,))) if self.options else ""
        solution = as_text("solution", first(row, (self.solution,)), (self.solution,)) if self.solution else None
        kind, unfit = self.marks(row) if self.marks is not None and isinstance(row, dict) else ("", "")
        if options and not kind:
            kind = "choice"
        question = _INSTRUCTION.sub("", question)
        return Found(question.strip(), None if answer is None else answer.strip(), options, solution, kind, unfit)


def first(row: Any, paths: Iterable[str]) -> Any:
    """The first value that is not None at the end of one of the paths."""
    for path in paths:
        value = row
        for step in path.split("."):
            value = _walk(value, step)
            if value is None:
                break
        if value is not None:
            return value
    return None


def _walk(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    if not isinstance(value, list):
        return None
    if step in ("@user", "@assistant"):
        roles = ("user", "human") if step == "@user" else ("assistant", "gpt", "model")
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role", turn.get("from")) in roles]
        turn = turns[0 if step == "@user" else -1] if turns else {}
        return turn.get("content", turn.get("value"))
    if re.fullmatch(r"-?\d+", step):
        position = int(step)
        return value[position] if -len(value) <= position < len(value) else None
    return None


def as_text(field: str, value: Any, paths: tuple[str, ...]) -> str | None:
    """A text, number or list of texts as text. Raises BadRow for NaN, infinities, bools, bytes, objects, half characters,
    endless ones."""
    if value is None:
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(field, value, "is no answer; give it a text or a number, or leave it out")
        value = int(value) if value.is_integer() and abs(value) < 1e15 else value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ",".join(value) if field == "answer" else "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(field, value, f"is a {type(value).__name__}, not a text; the map looks at {' or '.join(paths)}")
    text = value if isinstance(value, str) else repr(value)
    if len(text) > TEXT_LIMIT:
        raise BadRow(field, text, f"has {len(text):,} characters; at most {TEXT_LIMIT:,} make a {field}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise BadRow(
            field, text, "has half a surrogate pair or is not UTF-8; convert the file to UTF-8 (iconv -f GB18030 -t UTF-8)"
        )
    return text


def as_options(value: Any) -> str:
    """Multiple-choice options, one a line, blank ones too, so that each keeps its letter: texts, TAL's [{aoVal, content}],
    {"A": …}."""
    if isinstance(value, dict):
        value = [f"{key}. {text}" for key, text in value.items() if text is not None]
    if not isinstance(value, list):
        return ""
    lines = []
    for item in value:
        item = item[0] if isinstance(item, list) and item else item
        if isinstance(item, dict):
            item = f"{item.get('aoVal', item.get('label', ''))}. {item.get('content', item.get('text', ''))}"
        lines.append(" ".join(str(item).split()))  # a line break within one would make two of it
    return "\n".join(lines) if any(lines) else ""


def _numina(row: dict[str, Any]) -> tuple[str, str]:
    kind = {"MCQ": "choice", "multiple-choice": "choice", "proof": "proof"}.get(str(row.get("question_type")), "")
    if row.get("synthetic") is True or row.get("source") in _SYNTHETIC:
        return kind, "synthetic"
    wrong = [str(row.get(mark)) for mark in ("problem_is_valid", "solution_is_valid") if row.get(mark) not in (None, "Yes", True)]
    return kind, "invalid" if wrong else ""


def _subject(row: dict[str, Any]) -> tuple[str, str]:
    subject = str(row.get("domain", row.get("cot_type", "math"))).casefold()
    return "", "" if subject in ("math", "mathematics", "none", "") else "other_subject"


def _gaokao(row: dict[str, Any]) -> tuple[str, str]:
    return ("choice" if isinstance(row.get("answer"), list) else ""), ""


def _agieval(row: dict[str, Any]) -> tuple[str, str]:
    return ("choice" if row.get("options") else ""), ""


_TEXTS = ("question", "problem", "prompt", "query", "instruction", "input")
_ANSWERS = ("answer", "final_answer", "ground_truth", "gold", "golden", "gt_answer", "gt", "ans", "label", "target")

MAPS = {
    entry.name: entry
    for entry in (
        FieldMap("verl", ("prompt.@user",), ("reward_model.ground_truth",), ("prompt", "reward_model"), named=False),
        FieldMap("orz", ("@user", "0.value"), ("1.ground_truth.value", "ground_truth.value"), ("[]",), answers.boxed_or_short),
        FieldMap(
            "openthoughts-metadata",
            ("problem",),
            ("ground_truth_solution",),
            ("problem", "ground_truth_solution", "domain"),
            answers.boxed_or_short,
            solution="ground_truth_solution",
            marks=_subject,
        ),
        FieldMap(
            "openthoughts",
            ("conversations.@user",),
            ("conversations.@assistant",),
            ("conversations",),
            answers.last_boxed,
            marks=_subject,
        ),
        FieldMap("numinamath", ("problem",), ("answer",), ("problem", "question_type"), solution="solution", marks=_numina),
        FieldMap(
            "numinamath-cot",
            ("problem",),
            ("solution",),
            ("problem", "solution", "messages"),
            answers.last_boxed,
            solution="solution",
            marks=_numina,
        ),
        FieldMap(
            "s1k",
            ("question",),
            ("solution",),
            ("question", "solution", "cot_type"),
            answers.boxed_or_short,
            solution="solution",
            marks=_subject,
        ),
        FieldMap(
            "tal-scq5k",
            ("problem",),
            ("answer_value",),
            ("problem", "answer_option_list"),
            options="answer_option_list",
            solution="answer_analysis.0",
        ),
        FieldMap(
            "agieval", ("question",), ("answer", "label"), ("question", "options", "label"), options="options", marks=_agieval
        ),
        FieldMap(
            "gaokao",
            ("question",),
            ("answer",),
            ("question", "answer", "analysis", "category"),
            solution="analysis",
            marks=_gaokao,
        ),
        FieldMap("cmath", ("question",), ("golden",), ("question", "golden")),
        FieldMap("math23k", ("original_text",), ("ans",), ("original_text", "ans"), answers.sheet_fraction, solution="equation"),
        FieldMap("ape210k", ("original_text",), ("ans",), ("original_text", "ans"), answers.sheet_fraction, solution="equation"),
        FieldMap("limr", ("context_messages.@user", "prompt", "question"), ("answer",), ("context_messages", "answer")),
        FieldMap("gsm8k", ("question",), ("answer",), ("question", "answer", "####"), answers.after_hashes, solution="answer"),
        FieldMap("math", ("problem",), ("answer",), ("problem", "answer", "type", "difficulty")),
        FieldMap(
            "math-hendrycks",
            ("problem",),
            ("solution",),
            ("problem", "solution", "level", "type"),
            answers.last_boxed,
            solution="solution",
        ),
        FieldMap("deepscaler", ("problem",), ("answer",), (), solution="solution"),
        FieldMap("limo", ("question",), ("answer",), (), solution="solution"),
        FieldMap("generic", _TEXTS, _ANSWERS, (), options="options", solution="solution", named=False),
    )
}
"""Name → map, in the order in which they are tried. A map without `needs` is chosen by name only, but for `generic`, the last."""


def detect(row: Any, path_text: str) -> FieldMap:
    """The map for a file, by its first row's columns and, where two sets share them, by its path."""
    columns = set(row) if isinstance(row, dict) else {"[]"}
    if isinstance(row, dict) and "####" in str(row.get("answer")):
        columns.add("####")
    fitting = [entry for entry in MAPS.values() if entry.needs and columns.issuperset(entry.needs)]
    flat = re.sub(r"[^a-z0-9]", "", path_text.casefold())
    named = [entry for entry in fitting if entry.name.replace("-", "") in flat]
    return (named or fitting or [MAPS["generic"]])[0]


def by_name(name: str) -> FieldMap | None:
    """The map of that name, "numinamath-1.5" and "GSM8K" too; None where the name is only a label of the user's."""
    flat = re.sub(r"[^a-z0-9]", "", name.casefold())
    known = {re.sub(r"[^a-z0-9]", "", key): entry for key, entry in MAPS.items()}
    aliases = {
        "numinamath15": "numinamath",
        "openreasonerzero": "orz",
        "talscq": "talscq5k",
        "gaokaobench": "gaokao",
        "ape": "ape210k",
    }
    return known.get(aliases.get(flat, flat))


def by_user(fields: dict[str, str]) -> FieldMap:
    """`--map question=…,answer=…`. Raises InputError for an unknown field or a missing question or answer."""
    allowed = ("question", "answer", "solution", "options")
    for name in fields:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)[0]
            raise InputError(f"--map: {name!r} is no field; the nearest is {close!r} (fields: {', '.join(allowed)})")
    for name in ("question", "answer"):
        if name not in fields:
            raise InputError(f"--map: it names no {name}; write --map question=COLUMN,answer=COLUMN")
    return FieldMap(
        "generic",
        (fields["question"],),
        (fields["answer"],),
        (),
        None,
        fields.get("options", ""),
        fields.get("solution", ""),
        named=False,
    )


def is_letters(answer: str | None) -> bool:
    """B, AC, "A, C": the answer of a multiple-choice question."""
    return answer is not None and _LETTERS.fullmatch(answer.strip().strip("()（）.。$")) is not None


def chosen_option(answer: str, options: str) -> str:
    """The text of the option that a letter names ("B" of "A. 7\\nB. 8" is "8"); the answer itself where it names none."""
    if not options or len(answer.strip()) != 1:
        return answer
    found = re.search(rf"(?m)^[(（]?{re.escape(answer.strip())}[)）.．、:：]\s*(.+)$", options)
    return found[1] if found else answer
