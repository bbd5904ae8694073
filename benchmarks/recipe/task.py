"""What the experiments' policies learn: problems of reasoning-gym in three buckets of difficulty, and careless teachers.

    arithmetic   chain_sum of 2, 3 or 4 one-digit terms; the teacher adds up term by term
    letters      letter_counting in words of up to 4, 5 or 6 letters; the teacher goes letter by letter, no mathematics in it

A teacher miscounts in SLIP_RATE of its lines, so a warmed-up policy has the form and must learn to count right. Each line opens
with words that mean nothing, English or Chinese alike: saying the same in two languages is possible and free, as it was for the
paper's model. How they are chosen (`Wording`) decides the entropy that a policy starts RL with.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.demo_task import EQUALS, OPENERS, SLIPS, prompt_row

Task = Literal["arithmetic", "letters"]
BUCKETS = ("easy", "medium", "hard")
SLIP_RATE = 0.3
PARTS = {"warmup": 2400, "train": 2400}
HELDOUT = 60
"""Problems of each bucket; none is trained on."""
MOST_OPENERS = 6


@dataclass(frozen=True, slots=True)
class Wording:
    """How a teacher says a line. Opener number i and verb number i are taken with weight exp(-sharpness · i); a line has
    `openers` of them, and after each one more with probability `extra`."""

    sharpness: float = 0.0
    openers: int = 1
    extra: float = 0.0

    def open(self, generator: random.Random) -> str:
        count = self.openers
        while count < MOST_OPENERS and generator.random() < self.extra:
            count += 1
        return " ".join(self._pick(OPENERS, generator) for _ in range(count))

    def verb(self, generator: random.Random) -> str:
        return self._pick(EQUALS, generator)

    def _pick(self, words: tuple[str, ...], generator: random.Random) -> str:
        weights = [math.exp(-self.sharpness * place) for place in range(len(words))]
        return generator.choices(words, weights)[0]


PLAIN = Wording()


def write_task(folder: Path, task: Task, wording: Wording, seed: int) -> None:
    """warmup.jsonl with the teacher's solutions, train.jsonl, and easy.jsonl, medium.jsonl and hard.jsonl, held out."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = random.Random(seed)
    heldout, rest = {}, {}
    for bucket, entries in zip(BUCKETS, _entries(task, seed), strict=True):
        heldout[bucket], rest[bucket] = entries[:HELDOUT], entries[HELDOUT:]
        _write(folder, bucket, heldout[bucket])
    turns = {bucket: itertools.cycle(entries) for bucket, entries in rest.items()}
    for part, count in PARTS.items():
        entries = [next(turns[BUCKETS[number % len(BUCKETS)]]) for number in range(count)]
        _write(folder, part, entries, (lambda entry: solve(task, entry, wording, teacher)) if part == "warmup" else None)


def _write(folder: Path, part: str, entries: list[dict[str, Any]], solve: Any = None) -> None:
    rows = []
    for number, entry in enumerate(entries):
        row = prompt_row(f"{part}-{number:05d}", entry) | {"question": entry["shown"]}
        if solve is not None:
            row["solution"], row["answer"] = solve(entry)
        rows.append(json.dumps(row, ensure_ascii=False))
    (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _entries(task: Task, seed: int) -> Iterator[list[dict[str, Any]]]:
    """reasoning-gym's entries of each bucket, each question once, with what the policy is `shown`."""
    import reasoning_gym

    if task == "arithmetic":
        for terms in (2, 3, 4):
            form = {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1, "allow_negation": False}
            entries = reasoning_gym.create_dataset("chain_sum", size=3000, seed=seed, **form)
            yield _once(entry | {"shown": entry["metadata"]["expression"]} for entry in entries)
    else:
        pool = reasoning_gym.create_dataset("letter_counting", size=24000, seed=seed, min_words=1, max_words=1)
        known = _once(entry | {"shown": _spelled(entry)} for entry in pool if entry["metadata"]["span"][0].isalpha())
        for least, most in ((2, 4), (5, 5), (6, 6)):
            yield [entry for entry in known if least <= len(entry["metadata"]["span"][0]) <= most]


def _once(entries: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({entry["shown"]: entry for entry in entries}.values())


def _spelled(entry: dict[str, Any]) -> str:
    """'n in b a n a n a': letters apart, so that each is a token."""
    return f"{entry['metadata']['target_letter']} in {' '.join(entry['metadata']['span'][0].lower())}"


def solve(task: Task, entry: dict[str, Any], wording: Wording, teacher: random.Random) -> tuple[str, str]:
    """A worked solution and its answer, right or wrong: a slip is carried on to the end."""
    lines = []
    if task == "arithmetic":
        terms = entry["shown"].split()
        value = int(terms[0])
        for operator, term in zip(terms[1::2], terms[2::2], strict=True):
            result = value + (int(term) if operator == "+" else -int(term)) + _slip(teacher, SLIPS)
            lines.append(f"{wording.open(teacher)} {value} {operator} {term} {wording.verb(teacher)} {result}")
            value = result
    else:
        target, value = entry["metadata"]["target_letter"], 0
        for letter in entry["shown"].split()[2:]:
            value = max(0, value + (letter == target) + _slip(teacher, (-1, 1)))
            lines.append(f"{wording.open(teacher)} {letter} {wording.verb(teacher)} {value}")
    return "\n".join(lines), str(value)


def _slip(teacher: random.Random, slips: tuple[int, ...]) -> int:
    return teacher.choice(slips) if teacher.random() < SLIP_RATE else 0
