"""A file's outputs through the reward, batch by batch, and what came of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from rollout.errors import InputError
from rollout.reward.languages import Languages, measure_languages
from rollout.reward.outputs import Output
from rollout.types import Prompt, Sample, Verdict

BATCH = 128
"""Outputs judged at once."""


class Judge(Protocol):
    """`rollout.reward.pipeline.Reward` is one."""

    def judge(self, prompt_samples: list[tuple[Prompt, Sample]]) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True)
class Score:
    output: Output
    verdict: Verdict
    tokens: int
    languages: Languages

    def record(self) -> dict[str, Any]:
        """For a JSON line."""
        verdict, languages = self.verdict, self.languages
        return {
            "id": self.output.row,
            "source": self.output.prompt.source,
            "output": self.output.index,
            "right": verdict.right,
            "reward": verdict.reward if verdict.judged else None,
            "reason": verdict.reason,
            "detail": verdict.detail,
            "tokens": self.tokens,
            "mixed_languages": languages.mixed,
            "foreign_share": round(languages.foreign, 4),
            "scripts": {script: round(share, 4) for script, share in languages.shares.items()},
        }


def score(outputs: Iterable[Output], reward: Judge, tokenizer: Any, max_tokens: int | None) -> Iterator[list[Score]]:
    """Batch by batch. tokenizer: a fast one of transformers. max_tokens: an output of so many counts as truncated, cut off there;
    None: none does but those whose finish_reason says so."""
    batch: list[Output] = []
    for output in outputs:
        batch.append(output)
        if len(batch) == BATCH:
            yield _score(batch, reward, tokenizer, max_tokens)
            batch = []
    if batch:
        yield _score(batch, reward, tokenizer, max_tokens)


def _score(batch: list[Output], reward: Judge, tokenizer: Any, max_tokens: int | None) -> list[Score]:
    encoded = tokenizer([output.text for output in batch], add_special_tokens=False, verbose=False)["input_ids"]
    pairs = []
    for output, ids in zip(batch, encoded, strict=True):
        over = max_tokens is not None and len(ids) >= max_tokens
        token_ids = np.asarray(ids[:max_tokens], dtype=np.int32)
        finish = "length" if over else output.finish_reason
        pairs.append((output.prompt, Sample(token_ids, np.zeros(len(token_ids), np.float32), finish, 0)))
    return [
        Score(output, verdict, len(sample.token_ids), measure_languages(output.text, output.prompt.question))
        for output, verdict, (_, sample) in zip(batch, reward.judge(pairs), pairs, strict=True)
    ]


@contextmanager
def verdict_file(path: Path | None) -> Iterator[TextIO | None]:
    """For JSON lines: written beside `path` and renamed at the end, so that nothing half-written stands there whatever happens.
    Raises InputError where it cannot be written. None, None."""
    if path is None:
        yield None
        return
    beside = path.with_name(path.name + ".tmp")
    try:
        file = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: {path}: cannot be written ({error.strerror}); name another file") from None
    try:
        with file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write(file: TextIO | None, scores: list[Score]) -> None:
    if file is not None:
        file.writelines(json.dumps(each.record(), ensure_ascii=False) + "\n" for each in scores)
