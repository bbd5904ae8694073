"""The demo's data and warm model in a folder of its own, and how a run over them is started and read."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak.processes import MARK
from rollout.errors import InputError
from trainer import launch
from trainer.config_file import load_config
from trainer.demo_task import write_base_model, write_problems
from trainer.metrics import METRICS_FILE, comparable, read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
RANKS = 2


class Place:
    """A configuration whose model is there, and runs of it into folders of their own."""

    def __init__(self, config: Path, overrides: Sequence[str] = (), ranks: int = RANKS) -> None:
        self.config, self.overrides, self.ranks = config, list(overrides), ranks

    def command(self, run: Path, *more: str) -> list[str]:
        words = [sys.executable, "-m", "trainer.train", str(self.config), *self.overrides, *more]
        return [*words, f"run={run}", "--ranks", str(self.ranks)]

    def start(self, run: Path, mark: str, *more: str) -> subprocess.Popen:
        """In a session of its own; what it prints goes to RUN.log."""
        with run.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                self.command(run, *more),
                cwd=CONFIG.parents[1],
                env=clean_environment() | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(self, run: Path, mark: str, *more: str) -> None:
        """A whole run that nothing stops. Raises InputError where it fails."""
        if code := self.start(run, mark, *more).wait():
            raise InputError(f"{run.with_suffix('.log')}: the run that nothing stops ended with exit code {code}; read its end")


def clean_environment() -> dict[str, str]:
    """This process's, without what a torchrun around it has set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", MARK)}
    return {"OMP_NUM_THREADS": "1"} | kept


def demo_place(folder: Path, overrides: Sequence[str] = ()) -> Place:
    """configs/demo.yaml over data, base and warm model in `folder`, which are made where they are not there yet."""
    paths = [
        f"run={folder / 'run'}", f"model.path={folder / 'warm'}", f"warmup.base={folder / 'base'}",
        f"warmup.data.path={folder / 'data/warmup.jsonl'}", f"data.train.path={folder / 'data/train.jsonl'}",
        f"evaluation.sets[0].path={folder / 'data/heldout.jsonl'}",
    ]  # fmt: skip
    place = Place(CONFIG, [*paths, *overrides])
    if not (folder / "warm" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = load_config(CONFIG, place.overrides)
        write_problems(folder / "data", config.seed)
        write_base_model(config.warmup.base, config.warmup.data.path, config.seed)
        options = argparse.Namespace(config=CONFIG, overrides=place.overrides, ranks=RANKS)
        if code := launch.torchrun("trainer.warmup", options):
            raise InputError(f"{folder}: the warm-up of the demo's model ended with exit code {code}")
    return place


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What a run measured, without what the clock says."""
    return [comparable(row) for row in read_metrics(run)]


def steps_of(run: Path) -> int:
    """Rows of steps in the metrics so far."""
    path = run / METRICS_FILE
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0
