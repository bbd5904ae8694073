"""`python -m rollout.reward FILE`: the training's reward on outputs of one's own, before one trains with it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rollout.cli import Parser
from rollout.errors import InputError
from rollout.reward import report
from rollout.reward.correctness import Correctness, needs_judge
from rollout.reward.judge.settings import JudgeSettings
from rollout.reward.judge.verifier import JudgeVerifier, check_endpoint
from rollout.reward.outputs import find_fields, read_outputs
from rollout.reward.repetition import RepetitionLimits
from rollout.reward.rule import RuleVerifier, check_prompt
from rollout.reward.rules import RULES
from rollout.reward.scores import score, verdict_file, write

PREFILL = "<think>\n"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m rollout.reward", description="Scores outputs with the reward that a training would give them.")
    made.add_argument("file", type=Path, help="JSONL, JSON, Parquet or CSV; a row holds one output or a list of them")
    made.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="a model's folder: limits are in tokens of its tokenizer"
    )  # fmt: skip
    made.add_argument(
        "--map",
        default="",
        metavar="output=…,answer=…",
        help="columns (or paths: choices.0.text) of output, answer, question, id, source, finish_reason, metadata",
    )
    made.add_argument("--format", choices=("r1", "none"), default="r1", help="none: outputs without think and answer tags")
    made.add_argument("--prefill", default=PREFILL, help="what the prompts ended with (default: <think> and a line break)")
    made.add_argument("--rule", choices=tuple(RULES), default="math-verify")
    made.add_argument("--workers", type=int, default=2, help="verifier processes (default: 2)")
    made.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="hard limit for one answer (default: 10)")
    made.add_argument(
        "--repetition",
        default="",
        metavar="NAME=VALUE,…",
        help="limits: " + ", ".join(f"{each.name}={each.default}" for each in fields(RepetitionLimits)),
    )
    made.add_argument("--judge", metavar="URL", help='who judges rows whose metadata says "judge": true, as http://HOST:PORT/v1')
    made.add_argument("--judge-model", metavar="NAME", help="the judge's model, as its endpoint calls it")
    made.add_argument(
        "--judge-process",
        choices=("thinking", "answer", "off"),
        help="where the solving process is judged (default: thinking, off with --format none)",
    )
    made.add_argument("--judge-budget", type=int, metavar="REQUESTS", help="at most so many requests; the rest stays unjudged")
    made.add_argument("--max-tokens", type=int, default=None, help="outputs of so many tokens count as truncated")
    made.add_argument("--out", type=Path, default=None, metavar="verdicts.jsonl", help="every verdict, a JSON line each")
    made.add_argument("--quiet", action="store_true", help="no progress, no tables")
    return made


def main(arguments: list[str]) -> int:
    """Raises InputError for whatever a user can mend, before anything is scored."""
    given = parser().parse_args(arguments)
    found = find_fields(given.file, _pairs("--map", given.map))
    limits = _limits(given.repetition)
    if given.max_tokens is not None and given.max_tokens < 1:
        raise InputError(f"--max-tokens: {given.max_tokens} is too few; give it 1 or more")
    if given.out is not None and given.out.resolve() == given.file.resolve():
        raise InputError(f"--out: {given.out} is the file that is read; name another")
    total = 0
    for output in read_outputs(given.file, found):  # and every value is checked
        if not needs_judge(output.prompt):
            check_prompt(given.rule, f"{given.file}: {output.prompt.id}", output.prompt)
        total += 1
    tokenizer = _tokenizer(given.tokenizer)
    console = Console()
    if not given.quiet:
        named = ", ".join(f"{field}={columns[0]}" for field, columns in found.items() if len(columns) == 1)
        console.print("fields:", named, highlight=False, markup=False)
    summary = report.Summary()
    with verdict_file(given.out) as file, build_verifier(given) as verifier, _progress(given.quiet) as progress:
        reward = _reward(given, verifier, tokenizer, limits)
        task = progress.add_task("outputs", total=total)
        for scores in score(read_outputs(given.file, found), reward, tokenizer, given.max_tokens):
            write(file, scores)
            summary.add(scores)
            progress.advance(task, len(scores))
    if not given.quiet:
        for table in report.tables(summary):
            console.print(table)
        for line in report.hints(summary, tagged=given.format == "r1"):
            console.print("note:", line, highlight=False, markup=False)
    return 0


def build_verifier(given: argparse.Namespace) -> Correctness:
    """Who decides on correctness. Raises InputError where a judge is named and gives no verdict on a small question."""
    judge = None
    if (settings := _judge_settings(given)) is not None:
        check_endpoint(settings)
        judge = JudgeVerifier(settings, note=lambda text: print(text, file=sys.stderr))
    return Correctness(RuleVerifier(given.rule, given.workers, given.timeout), judge)


def _judge_settings(given: argparse.Namespace) -> JudgeSettings | None:
    if given.judge is None:
        for name in ("model", "process", "budget"):
            if getattr(given, f"judge_{name}") is not None:
                raise InputError(f"--judge-{name}: there is no judge; name its address with --judge")
        return None
    if not given.judge_model:
        raise InputError("--judge: needs the model's name; give it with --judge-model")
    if given.judge_budget is not None and given.judge_budget < 1:
        raise InputError(f"--judge-budget: {given.judge_budget} is too few; give it 1 or more")
    process = given.judge_process or ("thinking" if given.format == "r1" else "off")
    return JudgeSettings(given.judge, given.judge_model, process=process, budget_requests=given.judge_budget)


def _reward(given: argparse.Namespace, verifier: Correctness, tokenizer: Any, limits: RepetitionLimits) -> Any:
    from rollout.reward.pipeline import Reward
    from rollout.reward.untagged import UntaggedReward

    kind, prefill = (Reward, given.prefill) if given.format == "r1" else (UntaggedReward, "")
    return kind(verifier, tokenizer, prefill=prefill, repetition=limits)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer: {folder}/tokenizer.json: there is no such file; name the model's folder")
    from rollout.model_folder import load_tokenizer

    try:
        return load_tokenizer(folder)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        why = " ".join(str(error).split())[:160]
        raise InputError(f"--tokenizer: {folder}/tokenizer.json: is no tokenizer ({why}); fetch the model folder again") from None


def _limits(text: str) -> RepetitionLimits:
    limits = RepetitionLimits()
    kinds = {each.name: type(each.default) for each in fields(RepetitionLimits)}
    for name, value in _pairs("--repetition", text).items():
        if name not in kinds:
            raise InputError(f"--repetition: {name!r} is no limit; there are {', '.join(kinds)}")
        try:
            number = kinds[name](value)
        except ValueError:
            raise InputError(f"--repetition: {name}={value!r} is no {kinds[name].__name__}; write {name}=NUMBER") from None
        least = 3 if name == "min_count" else 1
        if not (number >= least if kinds[name] is int else 0 < number <= 1):
            bounds = f"{least} or more" if kinds[name] is int else "above 0, at most 1"
            raise InputError(f"--repetition: {name}={value} is out of bounds; give it {bounds}")
        limits = replace(limits, **{name: number})
    return limits


def _pairs(option: str, text: str) -> dict[str, str]:
    pairs = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise InputError(f"{option}: {part!r} is not NAME=VALUE; write {option} NAME=VALUE,NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
