"""A run so small that it takes seconds, and yet every part of the recipe has something to do; and the command that starts one.

The model is warmed up to name one of four digits at random, in the R1 form; each question asks for one of them. So about a
quarter of all outputs is right, and about two thirds of the groups of four are legitimate.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTIONS = 40
CONFIG = """\
run: {run}
seed: 3
model: {{path: {folder}/warm}}
template: {{system: ""}}
data: {{train: {{path: {folder}/train.jsonl}}, max_prompt_tokens: 24}}
warmup: {{base: {folder}/base, data: {{path: {folder}/warmup.jsonl}}, steps: 40, sequences: 16, lr: 3.0e-3, max_tokens: 48}}
evaluation: {{sets: [{{name: heldout, path: {folder}/train.jsonl, limit: 3}}], every: 3, k: 2}}
checkpoint: {{every: 1, keep: 20}}
batch: {{groups: 4, group_size: 4, mini_batches: 2, prompts_per_round: 14}}
actor: {{lr: 2.0e-4, warmup_steps: 3, tokens_per_micro_batch: 256}}
stages:
  - name: grpo
    steps: 2
    context: 40
    objective: {{entropy_target: 0.3, entropy_coefficient: 0.05}}
  - name: dapo
    steps: 3
    context: 44
    batch: {{dynamic: true}}
    recovery: {{enabled: true}}
    objective: {{advantage: pshw, loss_aggregation: token_sum, clip_high: 0.28}}
  - name: longer
    steps: 2
    context: 48
    batch: {{dynamic: true}}
    recovery: {{enabled: true}}
    objective: {{advantage: pshw, loss_aggregation: token_sum, clip_high: 0.28}}
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(folder: Path, run: Path, *changes: tuple[str, str]) -> Path:
    """The configuration of a run into `run`, beside it as a .yaml."""
    text = CONFIG.format(folder=folder, run=run)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = run.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments: str, module: str = "trainer.train", **options) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS` on one thread, in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
