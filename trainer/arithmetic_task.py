"""`python -m trainer.arithmetic_task FOLDER [--seed 1]`: problems for a small pretrained model on a CPU.

Half are sums and differences of three one-digit numbers, half of two two-digit numbers, all from reasoning-gym's chain_sum, whose
own scorer judges; none goes below zero on the way, and none stands in two files. The worked solutions of warmup.jsonl come from a
careless teacher, who goes term by term and miscounts in 30 % of the lines: they show the R1 form, and leave counting right to RL.
For configs/arithmetic-smollm2.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from trainer import cli
from trainer.demo_task import prompt_row

DIFFICULTIES = (
    {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "allow_negation": False},
    {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "allow_negation": False},
)
SLIP_RATE = 0.3
SLIPS = (-10, -2, -1, 1, 2, 10)
PARTS = {"warmup": 400, "train": 1400, "heldout": 200}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.arithmetic_task", description="Arithmetic for a small model.")
    parser.add_argument("folder", type=Path, help="where warmup.jsonl, train.jsonl and heldout.jsonl are written")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        write_problems(options.folder, options.seed)
    except OSError as error:
        raise InputError(f"{options.folder}: cannot be written ({error.strerror}); name another folder") from None
    print(f"{options.folder}: " + ", ".join(f"{count} {part}" for part, count in PARTS.items()))
    return 0


def write_problems(folder: Path, seed: int) -> None:
    """Three prompts files; the same ones for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = random.Random(seed)
    streams = [_entries(difficulty, seed) for difficulty in DIFFICULTIES]
    for part, count in PARTS.items():
        rows = []
        for number in range(count):
            entry = next(streams[number % len(streams)])
            row = prompt_row(f"{part}-{number:05d}", entry)
            if part == "warmup":
                row["solution"], row["answer"] = careless_solution(entry["metadata"]["expression"], teacher)
            rows.append(json.dumps(row, ensure_ascii=False))
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _entries(difficulty: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Entries of one difficulty, each question once."""
    import reasoning_gym

    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset("chain_sum", size=20 * sum(PARTS.values()), seed=seed, **difficulty):
        if entry["question"] not in seen and min(partial_sums(entry["metadata"]["expression"])) >= 0:
            seen.add(entry["question"])
            yield entry


def partial_sums(expression: str) -> list[int]:
    """'4 + 7 - 9' → [4, 11, 2]."""
    terms = expression.split()
    sums = [int(terms[0])]
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        sums.append(sums[-1] + int(term) * (1 if operator == "+" else -1))
    return sums


def careless_solution(expression: str, teacher: random.Random) -> tuple[str, str]:
    """'4 + 7 - 9' → ('4 + 7 = 11\\n11 - 9 = 3', '3'), a line wrong with probability SLIP_RATE."""
    terms = expression.split()
    value, lines = int(terms[0]), []
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        result = value + int(term) * (1 if operator == "+" else -1)
        if teacher.random() < SLIP_RATE:
            result += teacher.choice(SLIPS)
        lines.append(f"{value} {operator} {term} = {result}")
        value = result
    return "\n".join(lines), str(value)


if __name__ == "__main__":
    cli.run(main)
