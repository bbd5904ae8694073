"""A tiny random model with a tokenizer and a chat template, and its FP8 export, for what serves or compares them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from trainer import export
from trainer.demo_task import write_base_model

QUESTIONS = 12


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(base, export). The base's matrices are four times what they are at first, so that its distributions are not flat."""
    rows = [
        {"id": f"q{at}", "question": f"{at} + 1 =", "answer": str(at + 1), "solution": f"{at} and 1"} for at in range(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = folder / "base"
    write_base_model(base, folder / "questions.jsonl", 0)
    file = base / "model.safetensors"
    weights = {name: weight * 4 if weight.dim() == 2 else weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    export.main([str(base), "--out", str(folder / "fp8"), "--format", "fp8"])
    return base, folder / "fp8"
