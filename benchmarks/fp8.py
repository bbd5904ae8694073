"""`python -m benchmarks.fp8 BASE EXPORT --benchmarks … [--out FILE.json]`: what an export costs in accuracy, in the real vLLM.

    python -m trainer.export runs/stage3 --out models/confucius-fp8 --format fp8
    python -m benchmarks.fp8 models/confucius models/confucius-fp8 --benchmarks gsm8k --data DATA --limit 500 --out fp8.json

BASE and EXPORT are loaded one after the other, each by vLLM in BASE's --dtype (bfloat16), and asked the same prompts: those of
`rollout.evaluate`'s benchmarks, whose options are taken here too. What is reported (`benchmarks.agreement` has the formulas):

    weight error    by kind of layer, from the files
    logit error     of the base's own outputs at temperature 1, one a prompt, that both score; beside it the base's own: what it
                    said while it sampled against what it says when it scores, which is the noise of its arithmetic alone
    greedy          how far their greedy outputs agree
    accuracy        `rollout.evaluate`'s of both, question by question

With --work, every output is kept there and a stopped evaluation continues. The kernel that multiplied is read from vLLM's log:
the FP8 of a CPU is emulated, so its accuracy is FP8's and its speed is not (docs/serving.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from benchmarks.agreement import greedy_agreement, logit_error, paired_accuracy, weight_error
from benchmarks.vllm_log import linear_kernels
from rollout.cli import Parser, run
from rollout.engine import Decoding, Request
from rollout.environment import RunLock
from rollout.errors import InputError
from rollout.evaluate import cli as evaluation
from rollout.evaluate.cli import Asked
from rollout.evaluate.progress import Show
from rollout.evaluate.record import Outcome, Record
from rollout.evaluate.report import figures
from rollout.evaluate.runner import seed_of
from rollout.model_folder import longest_context, read_config
from rollout.types import Sample
from rollout.vllm.engine import Scores, VllmEngine
from rollout.weights.folder import FolderWeights
from rollout.weights.wire import FLOAT8, dequantize

BESIDE = 1
"""vLLM makes a token behind each sequence that it scores."""
SHOWN = ("pass@1", "interval_95", "truncated", "format_failures", "mean_length", "outputs")
"""Of an evaluation's figures, those that are kept here."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one model said. greedy, sampled: an output a prompt, in the order of the benchmarks. scores: of the base's sampled
    outputs; greedy_scores: of the base's greedy ones. outcomes: of each benchmark's outputs."""

    greedy: list[Sample]
    sampled: list[Sample]
    scores: list[Scores]
    greedy_scores: list[Scores]
    outcomes: dict[str, list[Outcome]]
    kernels: list[str]


def main(arguments: list[str]) -> int:
    options, rest = parser().parse_known_args(arguments)
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base, export = (checked(model, [*rest, "--out", str(work / name)]) for name, model in models(options).items())
        check_alike(base, export)
        weights = weight_error(stored_pairs(options.base, options.export))
        first = ask(base, None)
        second = ask(export, first)
    record = report(base, export, first, second) | {"weight_error": weights, "machine": evaluation.provenance_now()}
    show(record)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    commands = Parser(
        prog="python -m benchmarks.fp8",
        description="What an export costs in accuracy. All other options are rollout.evaluate's: --benchmarks, --data, --limit, "
        "--k, --max-new-tokens, --template, …",
        allow_abbrev=False,
    )
    commands.add_argument("base", type=Path, metavar="BASE", help="Hugging Face folder")
    commands.add_argument("export", type=Path, metavar="EXPORT", help="as trainer.export writes it from BASE")
    commands.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    commands.add_argument("--work", type=Path, metavar="DIR", help="where outputs are kept (default: nowhere)")
    return commands


def models(options: argparse.Namespace) -> dict[str, Path]:
    return {"base": options.base, "export": options.export}


def checked(model: Path, arguments: list[str]) -> Asked:
    """An evaluation of one of the two. Raises InputError."""
    asked = evaluation.checked(
        evaluation.parser().parse_args([str(model), "--engine", "vllm", "--dtype", "bfloat16", *arguments])
    )
    if asked.options.engine != "vllm":
        raise InputError(f"--engine {asked.options.engine}: the export is for vLLM, which serves both here; leave it out")
    positions = longest_context(read_config(model, "name a model folder"))
    if positions and asked.max_tokens + BESIDE > positions:
        raise InputError(
            f"--max-new-tokens {asked.decoding.max_new_tokens}: with the longest prompt and a token beside it leaves the model's "
            f"{positions} positions; give at most {asked.decoding.max_new_tokens - asked.max_tokens - BESIDE + positions}"
        )
    return asked


def check_alike(base: Asked, export: Asked) -> None:
    """Raises InputError where the two would not be asked the same."""
    for name, prompts in base.encoded.items():
        for place, (one, other) in enumerate(zip(prompts, export.encoded[name], strict=True)):
            if not np.array_equal(one, other):
                raise InputError(
                    f"{export.options.model}: encodes prompt {place} of {name} to other tokens than {base.options.model}; an "
                    "export has its base's tokenizer and chat template"
                )
    if base.end_token_ids != export.end_token_ids:
        raise InputError(
            f"{export.options.model}: ends outputs with tokens {export.end_token_ids}, its base with {base.end_token_ids}"
        )


# asking


def ask(asked: Asked, base: Said | None) -> Said:
    """base: what the base said; None for the base itself."""
    with (
        RunLock(asked.folder),
        closing(Record(asked.folder, evaluation.settings_of(asked), evaluation.provenance_now())) as record,
        Show(asked.options.quiet) as shown,
    ):
        name = asked.options.model.name
        shown.note(f"{name}: starting vLLM (log: {asked.folder / 'vllm.log'})")
        engine, sync = evaluation.engine_of(asked, shown.note, beyond=BESIDE)
        with closing(engine):
            evaluation.run_on(engine, sync, asked, record, shown)
            prompts = [ids for each in asked.encoded.values() for ids in each]
            greedy = generated(engine, prompts, asked, shown, f"{name}: greedy", greedy=True)
            sampled = generated(engine, prompts, asked, shown, f"{name}: sampled", greedy=False) if base is None else base.sampled
            scores = scored(engine, prompts, sampled, shown, f"{name}: samples")
            own = base.greedy if base else greedy
            greedy_scores = scored(engine, prompts, own, shown, f"{name}: greedy outputs")
        outcomes = {each.name: list(record.outcomes(each.name).values()) for each in asked.benchmarks}
    return Said(
        greedy, sampled, scores, greedy_scores, outcomes, linear_kernels((asked.folder / "vllm.log").read_text(errors="replace"))
    )


def generated(
    engine: VllmEngine, prompts: list[np.ndarray], asked: Asked, shown: Show, title: str, *, greedy: bool
) -> list[Sample]:
    """One output a prompt; where it is not greedy, from the model's own distribution, whatever the evaluation samples from."""
    shown.begin(title, 0, len(prompts))
    requests = [Request(ids, seed_of(asked.options.seed, "agreement", place)) for place, ids in enumerate(prompts)]
    return engine.generate(requests, Decoding(asked.decoding.max_new_tokens, greedy=greedy), lambda *new: tell(shown, *new))


def scored(engine: VllmEngine, prompts: list[np.ndarray], outputs: list[Sample], shown: Show, title: str) -> list[Scores]:
    """Of the outputs' tokens alone."""
    shown.begin(title, 0, len(outputs), "score")
    sequences = [np.concatenate([ids, output.token_ids]) for ids, output in zip(prompts, outputs, strict=True)]
    whole = engine.score(sequences, lambda *new: tell(shown, *new))
    return [Scores(each.logprobs[len(ids) - 1 :], each.best[len(ids) - 1 :]) for each, ids in zip(whole, prompts, strict=True)]


def tell(shown: Show, outputs: int, tokens: int) -> None:
    shown.sampled(outputs, tokens)
    shown.finished(outputs)


# weights


def stored_pairs(base: Path, export: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight of the base, weight of the export with its scale multiplied in), one at a time. Raises InputError where the
    export lacks one."""
    weights = FolderWeights(base)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(export.glob("*.safetensors"))]
        place = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, weight in weights:
            if name not in place:
                raise InputError(f"{export}: has no {name}, which {base} has; it is no export of it")
            other = place[name].get_tensor(name)
            if other.shape != weight.shape:
                raise InputError(
                    f"{export}: {name} is {list(other.shape)}, in {base} {list(weight.shape)}; it is no export of it"
                )
            if other.dtype == FLOAT8:
                scale = name.removesuffix("weight") + "weight_scale"
                if scale not in place:
                    raise InputError(f"{export}: has no {scale} beside the FP8 {name}; export it again")
                other = dequantize(other, place[scale].get_tensor(scale).flatten(), torch.float32)
            yield name, weight, other


# what is said


def report(base: Asked, export: Asked, first: Said, second: Said) -> dict[str, Any]:
    logprobs = [each.logprobs for each in first.scores]
    rights = [{name: right_by_question(each) for name, each in said.outcomes.items()} for said in (first, second)]
    return {
        "base": described(base, first),
        "export": described(export, second),
        "settings": {name: value for name, value in evaluation.settings_of(base).items() if name != "model"},
        "logit_error": {
            "export": logit_error(logprobs, [each.logprobs for each in second.scores]),
            "base itself": logit_error([each.logprobs for each in first.sampled], logprobs),
        },
        "greedy": greedy_agreement(
            [each.token_ids for each in first.greedy], [each.token_ids for each in second.greedy], second.greedy_scores
        ),
        "accuracy": {each.name: paired_accuracy(rights[0][each.name], rights[1][each.name]) for each in base.benchmarks},
        "evaluation": {
            which: {each.name: evaluated(each, said, asked.options.seed) for each in asked.benchmarks}
            for which, asked, said in (("base", base, first), ("export", export, second))
        },
    }  # fmt: skip


def described(asked: Asked, said: Said) -> dict[str, Any]:
    model = asked.options.model
    settings = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    return {
        "path": str(model),
        "fingerprint": evaluation.settings_of(asked)["model"],
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "quantization": settings.get("quant_method"),
        "kernels": said.kernels,
    }


def evaluated(benchmark: Any, said: Said, seed: int) -> dict[str, Any]:
    of_all = figures(benchmark, said.outcomes[benchmark.name], seed=seed)
    return {name: of_all[name] for name in SHOWN}


def right_by_question(outcomes: list[Outcome]) -> dict[int, float]:
    """Question → share of its judged outputs that are right; without those of which none was judged."""
    found: dict[int, list[bool]] = {}
    for outcome in outcomes:
        if outcome.right is not None:
            found.setdefault(outcome.question, []).append(outcome.right)
    return {question: sum(rights) / len(rights) for question, rights in found.items()}


def show(record: dict[str, Any]) -> None:
    console = Console(width=max(100, Console().width))
    table = Table("kind", "tensors", "relative error", "worst", title="weight error", title_justify="left")
    for kind, row in record["weight_error"].items():
        table.add_row(kind, str(row["tensors"]), f"{row['relative_error']:.5f}", f"{row['worst']:.5f} {row['worst_name']}")
    console.print(table)
    table = Table("", "tokens", "mean", "99.9th", "max", "k3", title="|Δ log-probability|, nats", title_justify="left")
    for name, row in record["logit_error"].items():
        cells = (f"{row[key]:.4g}" for key in ("mean", "p999", "max", "k3"))
        table.add_row(name, f"{row['tokens']:,}", *cells)
    console.print(table)
    greedy = record["greedy"]
    console.print(
        f"greedy: {greedy['identical']:.1%} of {greedy['prompts']} prompts identical; they part after "
        f"{greedy['mean_prefix']:.1f} of {greedy['mean_length']:.1f} tokens ({greedy['prefix_share']:.1%}); "
        f"top-1 {greedy['top_1']:.2%}"
    )
    table = Table("benchmark", "questions", "base", "export", "difference", "changed", title="accuracy", title_justify="left")
    for name, row in record["accuracy"].items():
        error = "" if row["standard_error"] is None else f" ± {100 * row['standard_error']:.2f}"
        table.add_row(
            name, str(row["questions"]), f"{row['base']:.2%}", f"{row['export']:.2%}", f"{100 * row['difference']:+.2f}{error}",
            str(row["changed"]),
        )  # fmt: skip
    console.print(table)
    for kernel in record["export"]["kernels"]:
        console.print(f"kernel: {kernel}")


if __name__ == "__main__":
    run(main)
