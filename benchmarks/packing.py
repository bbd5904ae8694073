"""`python -m benchmarks.packing --data DIR`: how full micro-batches are and how even ranks, over lengths of real outputs.

A step of 256 groups × 16 outputs is drawn from the lengths and packed (`trainer.packing.pack`) for 2, 8 and 32 ranks. Lengths:
every recorded output of a reasoning model in DIR ("traces"), those of them from 1,000 tokens on, and uniform from 200 to the
context.

    used        tokens of the sequences / tokens that the micro-batches could hold
    ranks       cost of the dearest rank / mean - 1; a sequence of n tokens costs n · (1 + n / ATTENTION_TOKENS)
    lockstep    sum over rounds of the dearest micro-batch / mean of the ranks - 1: what waiting for each other costs
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.reward_traces import parts, qwen_tokenizer
from rollout.cli import Parser
from rollout.environment import provenance
from rollout.errors import InputError
from trainer import cli
from trainer.packing import Plan, cost_of, pack

KINDS = ("traces", "long traces", "uniform")
OUTPUTS = 256 * 16
LONG = 1000


@dataclass(frozen=True, slots=True)
class Filling:
    """Of one plan. fewest: micro-batches a rank that any plan needs."""

    micro_batches: int
    fewest: int
    used: float
    ranks: float
    lockstep: float

    @classmethod
    def of(cls, plan: Plan, lengths: Sequence[int], budget: int) -> Filling:
        costs = np.array([[cost_of(indices, lengths) for indices in rank_bins] for rank_bins in plan])
        mean, places = costs.sum(1).mean(), costs.size
        return cls(
            micro_batches=costs.shape[1],
            fewest=math.ceil(sum(lengths) / (len(plan) * budget)),
            used=sum(lengths) / (places * budget),
            ranks=float(costs.sum(1).max() / mean - 1),
            lockstep=float(costs.max(0).sum() / mean - 1),
        )


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.packing", description="How full micro-batches are and how even ranks.")
    parser.add_argument("--data", type=Path, required=True, help="folder with traces_* and tokenizers, as for the tests")
    parser.add_argument("--context", type=int, default=16384, help="tokens of the longest sequence and of a micro-batch")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    if not (options.data / "traces_skythought").is_dir():
        raise InputError(f"--data {options.data}: has no traces_skythought; name the folder with the recorded outputs")
    real = real_lengths(options.data, options.context)
    rows = []
    for kind in KINDS:
        lengths = drawn(kind, real, options.context)
        for ranks in (2, 8, 32):
            filling = Filling.of(pack(lengths, ranks=ranks, budget=options.context), lengths, options.context)
            rows.append({"lengths": kind, "mean": float(np.mean(lengths)), "gpus": ranks} | asdict(filling))
    Console().print(table(rows))
    if options.out is not None:
        record = {"context": options.context, "outputs": OUTPUTS, "rows": rows, "machine": provenance()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def real_lengths(data: Path, context: int) -> np.ndarray:
    """Tokens of every recorded output, without its prompt, at most `context`."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = qwen_tokenizer(data, Path(scratch))
    encoded = tokenizer([part.text for part in parts(data)], add_special_tokens=False)["input_ids"]
    return np.asarray([min(len(ids), context) for ids in encoded if ids])


def drawn(kind: str, real: np.ndarray, context: int) -> list[int]:
    """Lengths of a step's outputs, always the same."""
    choice = {"traces": real, "long traces": real[real >= LONG], "uniform": np.arange(200, context + 1)}[kind]
    return np.random.default_rng(5).choice(choice, OUTPUTS).tolist()


def table(rows: list[dict]) -> Table:
    shown = Table(title=f"a step of {OUTPUTS} outputs")
    for column in ("lengths", "mean", "ranks", "micro-batches", "fewest", "used", "dearest rank", "lockstep"):
        shown.add_column(column, justify="left" if column == "lengths" else "right")
    for row in rows:
        shown.add_row(
            row["lengths"], f"{row['mean']:.0f}", str(row["gpus"]), str(row["micro_batches"]), str(row["fewest"]),
            f"{row['used']:.1%}", f"+{row['ranks']:.1%}", f"+{row['lockstep']:.1%}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    cli.run(main)
