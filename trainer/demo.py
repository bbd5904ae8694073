"""`make demo`: set a tiny model up, warm it up, train it through the three stages on two ranks, say in a table what came of it.

Exit code 1 where the recipe did not do its work: held-out pass@1 must rise by MIN_RISE, and stage 1's mean entropy over its last
third must lie within MAX_ENTROPY_GAP of TER's target.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from rollout.errors import InputError
from trainer import cli, launch
from trainer.config_file import load_config
from trainer.demo_task import write_base_model, write_problems
from trainer.environment import RunLock, check_packages
from trainer.summary import SUMMARY_FILE

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
RANKS = 2
MIN_RISE = 0.15
MAX_ENTROPY_GAP = 0.1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.demo", description="The recipe in small, on two CPU cores, in minutes."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of configs/demo.yaml")
    overrides = parser.parse_args(arguments).overrides
    check_packages()
    config = load_config(CONFIG, overrides)
    if config.run != load_config(CONFIG).run:
        raise InputError(
            f"command line: run: {str(config.run)!r}: the demo clears its run folder; it keeps to the one in {CONFIG.name}"
        )
    start = time.perf_counter()
    with RunLock(config.run):
        clear(config.run)

    print(f"keju demo: writing problems and a tiny random Qwen2 to {config.run}", flush=True)
    write_problems(config.run / "data", config.seed)
    write_base_model(config.warmup.base, config.warmup.data.path, config.seed)
    print(f"keju demo: supervised warm-up on {RANKS} ranks ({config.warmup.steps} steps)", flush=True)
    options = argparse.Namespace(config=CONFIG, overrides=overrides, ranks=RANKS)
    if code := launch.torchrun("trainer.warmup", options):
        return code
    print(
        f"keju demo: reinforcement learning on {RANKS} ranks ({config.total_steps} steps in {len(config.stages)} stages)",
        flush=True,
    )
    if code := launch.torchrun("trainer.train", options):
        return code
    print(f"keju demo: {time.perf_counter() - start:.0f} s in all; summary in {config.run / SUMMARY_FILE}")
    return verdict(json.loads((config.run / SUMMARY_FILE).read_text(encoding="utf-8")))


def clear(run: Path) -> None:
    """Removes what an earlier demo left; the demo starts anew each time."""
    for stale in (*run.glob("metrics.jsonl*"), run / SUMMARY_FILE):
        stale.unlink(missing_ok=True)
    folders = [run / name for name in ("checkpoints", "tensorboard", "figures", "data", "base", "warm", "health")]
    for stale in (*folders, *run.glob("samples*")):
        shutil.rmtree(stale, ignore_errors=True)


def verdict(summary: dict) -> int:
    """0 where the two promises of this module's head hold; else 1, with a line on stderr for each that does not."""
    change, entropy = summary["evaluations"][0], summary["entropy"]
    rise = change["last"]["pass_at_1"] - change["first"]["pass_at_1"]
    gap = abs(entropy["mean"] - entropy["target"])
    problems = []
    if rise < MIN_RISE:
        problems.append(f"pass@1 on {change['name']} rose by {rise:.3f}, not by {MIN_RISE}")
    if gap > MAX_ENTROPY_GAP:
        problems.append(
            f"mean entropy {entropy['mean']:.3f} is {gap:.3f} from the target {entropy['target']}, more than {MAX_ENTROPY_GAP}"
        )
    for problem in problems:
        print(f"keju demo: FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main)
