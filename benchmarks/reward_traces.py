"""The real outputs under ../shared/data (traces_*), one part after the other, and the labels given to some of them by reading."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rollout.model_folder import load_tokenizer

LABELS = Path(__file__).parent.parent / "tests" / "rollout" / "repetition_labels.csv"
LOOP_RATIO = 0.12
"""A text that zlib makes smaller than this part of it is a loop, whatever else it says."""
_SKYTHOUGHT = {
    "skythought-qwen-aime24": "Qwen--Qwen2.5-Math-7B--aime24__qwen25-math-cot_-1_seed0_t0.0_s0_e-1.jsonl",
    "skythought-qwen-amc23": "Qwen--Qwen2.5-Math-7B--amc23__qwen25-math-cot_-1_seed0_t0.0_s0_e-1.jsonl",
    "skythought-skyt1-amc23": "Sky-T1-math-correct-5K-14B--amc23__Sky-T1_-1_seed0_t0.0_s0_e-1.jsonl",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One output, or its thinking or answer where the source keeps them apart. row: its place in the source, with `.k` for the
    k-th of a question's outputs; part: all, thinking or answer. question: "" where the source has none."""

    source: str
    row: str
    part: str
    text: str
    question: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.row, self.part


def zlib_ratio(text: str) -> float:
    """Bytes after zlib.compress by bytes before."""
    raw = text.encode()
    return len(zlib.compress(raw)) / max(1, len(raw))


def parts(data: Path) -> Iterator[Part]:
    """All 4,606 of them."""
    for row, record in enumerate(_lines(data / "traces_gspo_r1distill15b" / "rollouts.jsonl")):
        yield Part("gspo-r1distill15b", str(row), "all", record["response"])
    for row, record in enumerate(_lines(data / "traces_math_cot_100" / "math_cot_100.jsonl")):
        for k, text in enumerate(record["code"]):
            yield Part("math-cot-100", f"{row}.{k}", "all", text, record["question"])
    for name in ("ollama", "openrouter"):
        file = data / "traces_rasbt_r1" / f"sample_{name}_outputs.json"
        for row, record in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            yield Part(f"rasbt-{name}", str(row), "thinking", record["message_thinking"], record["problem"])
            yield Part(f"rasbt-{name}", str(row), "answer", record["message_content"], record["problem"])
    for source, file_name in _SKYTHOUGHT.items():
        for row, record in enumerate(_lines(data / "traces_skythought" / file_name)):
            yield Part(source, str(row), "all", record["code"][0], record["question"])


def labels() -> dict[tuple[str, str, str], str]:
    """A part's key → loop, clean or borderline."""
    with LABELS.open(encoding="utf-8", newline="") as file:
        return {(row["source"], row["row"], row["part"]): row["label"] for row in csv.DictReader(file)}


def qwen_tokenizer(data: Path, folder: Path) -> PreTrainedTokenizerFast:
    """The real Qwen2.5 tokenizer, unpacked into `folder`."""
    source = data / "tokenizers" / "qwen2.5"
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
