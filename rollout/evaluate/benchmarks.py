"""The benchmarks: where their files lie, how their rows are read, and what the paper says of them.

Readers and field maps are the curation's: one place knows where a public set keeps its questions. A benchmark is read whole or
refused: one row that cannot be read would make another benchmark of it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from curation import errors as curation_errors
from curation import readers
from curation.answers import is_placeholder
from curation.fields import MAPS, BadRow, FieldMap, Found, detect, is_letters
from rollout.errors import InputError
from rollout.evaluate.statistics import k_by_rule
from rollout.reward.final_answer import chosen_letters
from rollout.types import Prompt

_SUFFIX = r"\.(?:jsonl|json|parquet|csv)"
_COMPETITION = FieldMap(
    "competition", ("problem", "Problem", "question", "prompt.@user"), ("answer", "Answer", "reward_model.ground_truth")
)
_MATHBENCH = FieldMap("mathbench", ("question",), ("answer",), options="options")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_NAMED_OPTION = re.compile(r"[(（]?([A-H])[)）.．、:：]")
_CHOICE_HINT = "Give only the letter of the right option as the answer."
_CHOICE_HINT_CHINESE = "请只以正确选项的字母作答。"


@dataclass(frozen=True, slots=True)
class Known:
    """A benchmark of the paper, or a public one beside. file: matches the path of its files below a data folder, in small
    letters; where: where to get it; k: the paper's own, where it is not by its rule; paper: pass@1 in the paper's table 3, in per
    cent (Confucius3-Math, 14 B)."""

    name: str
    title: str
    fields: FieldMap
    file: str
    where: str
    k: int | None = None
    paper: float | None = None
    several: bool = False
    """Whether it comes in several files, all of which belong to it."""


KNOWN = {
    each.name: each
    for each in (
        Known("ck12-math", "CK12-MATH", MAPS["generic"], rf"ck12[-_]?math[^/]*{_SUFFIX}",
              "it is the paper's own and not public", paper=96.24),
        Known("gaokao", "GAOKAO-Bench math", MAPS["gaokao"], r"2010-2022_math_ii?_(?:mcqs|fill-in-the-blank)\.json",
              "github.com/OpenLMLab/GAOKAO-Bench, Data/*/2010-2022_Math_*.json (MCQs, Fill-in-the-Blank)",
              paper=98.46, several=True),
        Known("mathbench-k12", "MathBench K12", _MATHBENCH, r"(?:primary|middle|high)/(?:single_choice|cloze)_(?:cn|en)\.jsonl",
              "github.com/open-compass/MathBench, primary/, middle/ and high/", paper=95.10, several=True),
        Known("cmath", "CMATH", MAPS["cmath"], rf"cmath[^/]*(?:/.*)?test[^/]*{_SUFFIX}",
              "github.com/XiaoMi/cmath, cmath_test.jsonl", paper=96.13),
        Known("math500", "MATH-500", _COMPETITION, rf"math[-_]?500[^/]*(?:/.*test[^/]*)?{_SUFFIX}",
              "the data set HuggingFaceH4/MATH-500, test.jsonl", k=64, paper=98.44),
        Known("aime2024", "AIME 2024", _COMPETITION, rf"aime[-_]?(?:20)?24[^/]*(?:/.*)?{_SUFFIX}",
              "the data set HuggingFaceH4/aime_2024 or Maxwell-Jia/AIME_2024", k=64, paper=81.15),
        Known("aime2025", "AIME 2025", _COMPETITION, rf"aime[-_]?(?:20)?25[^/]*(?:/.*)?{_SUFFIX}",
              "the data set opencompass/AIME2025 or math-ai/aime25", k=64, paper=69.95),
        Known("amc2023", "AMC 2023", _COMPETITION, rf"amc[-_]?(?:20)?23[^/]*(?:/.*)?{_SUFFIX}",
              "the data set math-ai/amc23"),
        Known("gsm8k", "GSM8K", MAPS["gsm8k"], rf"gsm8k[^/]*(?:/.*)?test[^/]*{_SUFFIX}",
              "github.com/openai/grade-school-math, grade_school_math/data/test.jsonl"),
        Known("tal-scq5k", "TAL-SCQ5K (Chinese)", MAPS["tal-scq5k"], r"ch_single_choice_test[^/]*\.jsonl",
              "github.com/math-eval/TAL-SCQ5K, ch_single_choice_test_2K.jsonl"),
        Known("tal-scq5k-en", "TAL-SCQ5K (English)", MAPS["tal-scq5k"], r"en_single_choice_test[^/]*\.jsonl",
              "github.com/math-eval/TAL-SCQ5K, en_single_choice_test_2K.jsonl"),
    )
}  # fmt: skip
"""By name; those of the paper's table 3 first, in its order."""


_COMMA = rf",(?=[\w.-]+=|(?:{'|'.join(KNOWN)})(?:,|$))"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """prompts: those to be asked, the first of the set's `size`. digest: over their questions, with options, and answers. paper:
    as `Known.paper`."""

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    size: int
    k: int
    digest: str
    paper: float | None = None


def parse_names(texts: list[str]) -> dict[str, Path | None]:
    """`gsm8k,cmath`, `math500=FILE` → name → its file or folder, None where it is to be found. Raises InputError."""
    names: dict[str, Path | None] = {}
    for text in texts:
        # A comma within a path ends it only where NAME= or a known name follows.
        for part in re.split(_COMMA if "=" in text else ",", text):
            name, equals, path = part.strip().partition("=")
            if not re.fullmatch(r"[\w.-]+", name) or (equals and not path):
                raise InputError(
                    f"--benchmarks: {part!r} is neither NAME nor NAME=PATH; write, say, gsm8k or mine=questions.jsonl"
                )
            if name in names:
                raise InputError(f"--benchmarks: {name!r} is named twice; name it once")
            if not equals and name not in KNOWN:
                close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
                raise InputError(
                    f"--benchmarks: {name!r} is no known benchmark; the nearest is {close!r}; your own is {name}=PATH"
                )
            names[name] = Path(path) if equals else None
    return names


def load(
    name: str,
    path: Path | None,
    data: Path | None,
    *,
    fields: FieldMap | None = None,
    limit: int | None = None,
    k: int | None = None,
) -> Benchmark:
    """path: its file, or a folder with its files; None: it is looked for below `data`. fields: for the rows of a benchmark that
    is not known, None to find them by its columns. limit: the first so many questions. k: None for the paper's rule, by the size
    of the whole set.

    Raises InputError, one line, naming file, row, field and mend.
    """
    known = KNOWN.get(name)
    files = _files(name, known, path, data)
    rows = [row for file in files for row in _read(file, known.fields if known else fields)]
    prompts = tuple(
        _prompt(f"{name}-{number:05d}", name, where, found) for number, (where, found) in enumerate(rows[:limit], start=1)
    )
    content = json.dumps([[prompt.question, prompt.answer] for prompt in prompts]).encode()
    return Benchmark(
        name=name,
        title=known.title if known else name,
        prompts=prompts,
        size=len(rows),
        k=k or k_by_rule(len(rows), known.k if known else None),
        digest=hashlib.sha256(content).hexdigest()[:16],
        paper=known.paper if known else None,
    )


def _files(name: str, known: Known | None, path: Path | None, data: Path | None) -> list[Path]:
    if path is not None and not path.is_dir():
        return [path]  # a missing one is the reader's to name
    folder = path if path is not None else data
    get = f"get it ({known.where}) and write {name}=PATH" if known else f"write {name}=FILE"
    if folder is None:
        raise InputError(f"{name}: no file is named; {get}, or name the folder where it lies with --data")
    if not folder.is_dir():
        raise InputError(f"--data: {folder}: there is no such folder; name the one where the benchmarks lie")
    if known is None:
        raise InputError(f"{folder}: is a folder; {get}")
    pattern = re.compile(rf"(?:.*/)?{known.file}")
    # The folder's own name counts: cmath/test.jsonl is found from inside cmath too.
    places = {
        file: f"{folder.resolve().name}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*") if file.is_file()
    }
    found = sorted(file for file, place in places.items() if pattern.fullmatch(place.casefold()))
    if not found:
        raise InputError(f"{name}: no file below {folder} is named as its are; {get}")
    if len(found) > 1 and not known.several:
        raise InputError(f"{name}: {found[0]} and {found[1]} both look like it; write {name}=PATH for the one that counts")
    return found


def _read(file: Path, fields: FieldMap | None) -> list[tuple[str, Found]]:
    """(place for messages, what the row says) of all rows of a file."""
    try:
        return list(_rows(file, fields))
    except curation_errors.InputError as error:
        raise InputError(str(error)) from None


def _rows(file: Path, fields: FieldMap | None) -> Iterator[tuple[str, Found]]:
    read = False
    for place, row in readers.rows(file):
        where, read = f"{file}: {place}", True
        if isinstance(row, readers.Broken):
            raise InputError(f"{where}: {row.reason}")
        fields = fields or detect(row, str(file))
        try:
            found = fields.read(row)
        except BadRow as error:
            raise InputError(f"{where}: {error}") from None
        if found.answer is None or is_placeholder(found.answer):
            columns = ", ".join(list(row)[:8]) if isinstance(row, dict) else "a list"
            raise InputError(
                f"{where}: field answer: {found.answer!r} is no answer; fill it in, drop the row, or map the field with "
                f"--map answer=COLUMN (columns: {columns})"
            )
        yield where, found
    if not read:
        raise InputError(f"{file}: holds no rows; give it at least one question")


def _prompt(identity: str, name: str, where: str, found: Found) -> Prompt:
    if found.kind != "choice":
        return Prompt(identity, found.question, found.answer, name)
    letters = chosen_letters(found.answer) if is_letters(found.answer) else None
    if letters is None:
        raise InputError(
            f"{where}: field answer: {found.answer!r} names no option of a multiple-choice question; give its letter"
        )
    hint = _CHOICE_HINT_CHINESE if _CHINESE.search(found.question) else _CHOICE_HINT
    question = "\n".join(part for part in (found.question, _lettered(found.options), hint) if part)
    return Prompt(identity, question, "".join(sorted(letters)), name, metadata={"choice": True})


def _lettered(options: str) -> str:
    """One option a line; letters are put before them where they have none."""
    lines = options.split("\n")
    named = [_NAMED_OPTION.match(line) for line in lines]
    if all(match and match[1] == chr(ord("A") + place) for place, match in enumerate(named)):
        return options
    return "\n".join(f"{chr(ord('A') + place)}. {line}" for place, line in enumerate(lines))
