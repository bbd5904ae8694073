"""What is trained: starts, runs, and the configuration that each of them is."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.recipe.task import BUCKETS, PLAIN, Task, Wording

THREADS = 1
"""Of a run: two side by side are faster than one on two."""
LEARNING_RATE = 1.5e-4
GRPO = {"advantage": "grpo", "loss_aggregation": "response_mean", "clip_high": 0.2}
TER = GRPO | {"entropy_target": 0.55, "entropy_coefficient": 0.6}
DAPO = {"advantage": "centered", "loss_aggregation": "token_sum", "clip_high": 0.28}
PSHW = DAPO | {"advantage": "pshw"}
DYNAMIC = {"dynamic": True}
RSR = {"enabled": True}


@dataclass(frozen=True, slots=True)
class Size:
    """Of every run. seeds: 1, 2, … of each arm; where an experiment says that it takes fewer, its own number at most."""

    seeds: int = 5
    steps: int = 32
    warmup: int = 450
    groups: int = 24
    group_size: int = 6
    every: int = 8
    """Steps between evaluations."""
    limit: int = 60
    """Held-out problems of each bucket."""
    quick: bool = False
    """Corners of each map alone, and no claim about what comes out."""


FULL = Size()
QUICK = Size(seeds=1, steps=2, warmup=60, groups=4, group_size=6, every=2, limit=4, quick=True)


@dataclass(frozen=True, slots=True)
class Start:
    """A warmed-up policy and its problems."""

    seed: int
    warmup: int
    wording: Wording = PLAIN
    task: Task = "arithmetic"

    @property
    def key(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True, slots=True)
class Run:
    """One training. labels: what it stands for in an experiment's figure and table. stages: changes to the one stage, or to each
    of several."""

    labels: dict[str, Any]
    start: Start
    size: Size
    stages: tuple[dict[str, Any], ...] = field(default=({},))
    context: int = 80

    @property
    def key(self) -> str:
        """Equal for runs that are the same training, whatever they are called."""
        return digest([self.start.key, config(self, Path("work"))])


def digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def config(run: Run, work: Path) -> dict[str, Any]:
    """As it stands in the run's YAML, all but the run folder, which is named after it. work: where models and data lie."""
    size, folder = run.size, work / "starts" / run.start.key
    steps, rest = divmod(size.steps, len(run.stages))
    stage = {"context": run.context}
    return {
        "seed": run.start.seed,
        "model": {"path": str(folder / "warm")},
        "template": {"system": ""},
        "data": {"train": {"path": str(folder / "data" / "train.jsonl")}, "max_prompt_tokens": 32},
        "reward": {"rule": "reasoning-gym"},
        "evaluation": {
            "sets": [
                {"name": bucket, "path": str(folder / "data" / f"{bucket}.jsonl"), "limit": size.limit} for bucket in BUCKETS
            ],
            "every": size.every, "k": 2, "top_p": 1.0,
        },
        "checkpoint": {"every": size.steps},
        "samples": {"groups": 0},
        "batch": {"groups": size.groups, "group_size": size.group_size},
        "actor": {"lr": LEARNING_RATE, "warmup_steps": 4, "tokens_per_micro_batch": 8192},
        "stages": [
            stage | {"name": f"stage {number + 1}", "steps": steps + (rest if number == 0 else 0)} | copy.deepcopy(changes)
            for number, changes in enumerate(run.stages)
        ],
    }  # fmt: skip


def warmup_config(start: Start, work: Path) -> dict[str, Any]:
    folder = work / "starts" / start.key
    return {
        "run": str(folder / "run"),
        "seed": start.seed,
        "model": {"path": str(folder / "warm")},
        "template": {"system": ""},
        "data": {"train": {"path": str(folder / "data" / "train.jsonl")}, "max_prompt_tokens": 32},
        "warmup": {
            "base": str(folder / "base"), "data": {"path": str(folder / "data" / "warmup.jsonl")}, "steps": start.warmup,
            "sequences": 64, "lr": 2.0e-3, "warmup_steps": 20, "max_tokens": 112,
        },
        "reward": {"rule": "reasoning-gym"},
        "batch": {"groups": 1, "group_size": 2},
        "stages": [{"name": "none", "steps": 1, "context": 80}],
    }  # fmt: skip


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
