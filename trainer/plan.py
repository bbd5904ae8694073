"""`python -m trainer.plan CONFIG --gpus 8 --memory 80GB`: whether a configuration fits, what it will take, and what to change.

Exit code 0: it fits. 2: it does not, and one line says which phase, how much and a configuration that was found to fit.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.cli import Parser
from rollout.errors import InputError
from trainer import cli
from trainer.config_file import load_config

if TYPE_CHECKING:
    from trainer.planner.plan import Plan

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}


def main(arguments: list[str]) -> int:
    from rich.console import Console

    options = _parser().parse_intermixed_args(arguments)
    errors = Console(stderr=True)
    plan, mend = plan_of(options, note=lambda text: errors.print(f"[dim]trying: {text}[/dim]", highlight=False))
    from trainer.planner import report

    if options.json:
        print(json.dumps(report.as_json(plan, mend), indent=1, default=list))
    else:
        report.show(plan, Console() if Console().is_terminal else Console(width=200))
    if plan.late_stop is not None:
        print(f"keju: warning: {options.config}: {plan.late_stop}", file=sys.stderr)
    if plan.fault is not None:
        raise InputError(refusal(options.config, plan, mend))
    return 0


def plan_of(options: Any, note: Callable[[str], None]) -> tuple[Plan, Plan | None]:
    """(the plan, and where it does not fit one that does, if there is any)."""
    config = load_config(options.config, options.overrides)
    from trainer.planner.architecture import model_folder
    from trainer.planner.cost import Ceilings, Work
    from trainer.planner.plan import Machine, Question, make_plan, mended

    if options.stage is not None and options.stage > len(config.stages):
        raise InputError(f"command line: --stage: {options.stage} is beyond the {len(config.stages)} stages of {options.config}")
    stages = tuple(range(len(config.stages))) if options.stage is None else (options.stage - 1,)
    with model_folder(config.model.path, options.architecture) as (folder, model):
        question = Question(
            config=config,
            machine=Machine(options.gpus, options.memory),
            folder=folder,
            model=model,
            stages=stages,
            overhead=options.overhead,
            price=options.price,
            ceilings=Ceilings(
                options.tflops * 1e12, options.bandwidth * 1e12, options.link * 1e9, options.disk * 1e9, options.utilisation
            ),
            work=Work(options.response_share, options.sampled_per_trained),
        )
        plan = make_plan(question)
        return plan, mended(plan, note) if plan.fault is not None and options.mend else None


def refusal(path: Path, plan: Plan, mend: Plan | None) -> str:
    """One line."""
    if mend is None:
        return (
            f"{path}: does not fit: {plan.fault}; no mend that was tried fits: use a smaller model, shorter contexts or more GPUs"
        )
    return f"{path}: does not fit: {plan.fault}; with {', '.join(mend.question.changes)} it does"


def bytes_of(text: str) -> int:
    """80GB (10^9), 80GiB (2^30), or bytes. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match and match[2].upper()
    if not match or unit not in UNITS or float(match[1]) == 0:
        raise InputError(f"command line: --memory: {text!r} is no amount of memory; write it as 80GB or 74.5GiB")
    return int(float(match[1]) * UNITS[unit])


def _parser() -> Parser:
    from trainer.planner.cost import Ceilings, Work
    from trainer.planner.fit import OVERHEAD

    parser = Parser(prog="python -m trainer.plan", description="Whether a configuration fits the GPUs, and what it will take.")
    parser.add_argument("config", type=Path, help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, as trainer.train takes them")
    parser.add_argument("--gpus", type=_whole("--gpus"), required=True, help="ranks, one a GPU")
    parser.add_argument("--memory", type=bytes_of, required=True, help="of one GPU: 80GB is 80·10⁹ bytes, 80GiB 80·2³⁰")
    parser.add_argument("--architecture", help="plan for this named model instead of the folder model.path (qwen2.5-14b, …)")
    parser.add_argument("--stage", type=_whole("--stage"), help="trace the memory of this stage alone, from 1 (default all)")
    parser.add_argument("--json", action="store_true", help="print JSON and no tables")
    parser.add_argument("--no-mend", dest="mend", action="store_false", help="do not look for a configuration that fits")
    default, work = Ceilings(), Work()
    for name, value, text in (
        ("--tflops", default.flops / 1e12, "bf16 TFLOP/s of a GPU"),
        ("--bandwidth", default.bandwidth / 1e12, "its memory's TB/s"),
        ("--link", default.link / 1e9, "GB/s from a GPU to the others"),
        ("--disk", default.disk / 1e9, "GB/s of checkpoints, all ranks together"),
        ("--utilisation", default.utilisation, "share of --tflops that score and update reach, assumed"),
        ("--overhead", OVERHEAD, "what the allocator holds beyond tensors, as a share of them, assumed"),
        ("--price", 2.0, "dollars a GPU-hour"),
        ("--response-share", work.response_share, "mean response length as a share of its limit, assumed"),
        ("--sampled-per-trained", work.sampled_per_trained, "outputs sampled for each one trained on, dynamic stages, assumed"),
    ):
        zero = name in ("--overhead", "--price")
        parser.add_argument(name, type=_number(name, zero), default=value, metavar="X", help=f"{text} (default {value:g})")
    return parser


def _whole(name: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise InputError(f"command line: {name}: {text!r} is not a whole number above 0")
        return int(text)

    return read


def _number(name: str, zero: bool) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise InputError(f"command line: {name}: {text!r} is not a number {'from' if zero else 'above'} 0")
        return value

    return read


if __name__ == "__main__":
    cli.run(main)
