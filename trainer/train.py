"""`torchrun -m trainer.train CONFIG [key=value …]`: the whole run, stage after stage, from where its folder left off.

Started plainly it trains on one rank, or with `--ranks N` hands itself to torchrun.
"""

from __future__ import annotations

import argparse
import os
from contextlib import closing

from rollout.process import few_arenas
from trainer import launch
from trainer.beats import BeatingConsole
from trainer.config import RunConfig
from trainer.config_file import load_config
from trainer.console import Console, NullConsole
from trainer.environment import RunLock, provenance
from trainer.metrics import read_metrics
from trainer.planner.launch import check_memory
from trainer.plot import plot
from trainer.preflight import Inputs, check_run
from trainer.summary import summarize, table, write_summary
from trainer.watch import Watch


def main(arguments: list[str]) -> int:
    options = launch.parse("trainer.train", "Train a policy by reinforcement learning, stage after stage.", arguments)
    if launch.is_rank():
        launch.die_with_torchrun()
    config = load_config(options.config, options.overrides)
    if launch.is_rank():
        return run_rank(config, None if options.checked else options)
    if options.check or options.ranks > 1 or options.restarts:
        inputs = check_run(config)
        check_memory(options)
        RunLock.check(config.run)
        if options.check:
            prompts = sum(source.state()["count"] for source in inputs.sources.values())
            print(f"{options.config}: {prompts} prompts, {config.total_steps} steps: fine")
            return 0
        return launch.torchrun("trainer.train", options, config)
    return run_rank(config, options)


def run_rank(config: RunConfig, options: argparse.Namespace | None = None) -> int:
    """This process's part of a run. Rank 0 checks and reads the inputs and owns the run folder.

    options: of a launch whose memory has not been checked yet.
    """
    launch.refuse_restart(config.run)
    few_arenas()
    watch = Watch(
        config.run,
        launch.rank(),
        launch.world_size(),
        seconds=config.parallel.timeout_seconds,
        stop_seconds=config.checkpoint.stop_seconds,
        clear=options is not None and launch.first_start(config.run),
        parent=os.getppid() if launch.is_rank() else None,
        launch=launch.launch_name(),
    )
    if not launch.first_rank():
        train(config, None, watch)
        return 0
    inputs = check_run(config)
    if options is not None:
        check_memory(options)
    with RunLock(config.run):
        if (stopped := train(config, inputs, watch)) is not None:
            print(stopped, flush=True)
        else:
            conclude(config)
    return 0


def train(config: RunConfig, inputs: Inputs | None, watch: Watch) -> str | None:
    """From the newest checkpoint to the last step, on this rank; where it was stopped before, in words. inputs: on rank 0
    alone."""
    with watch:
        # Imported under the watch: on a network file system this may hang, too.
        from trainer.distributed import process_group
        from trainer.evaluation import check_room
        from trainer.loop import StoppedAsAsked, TrainingLoop
        from trainer.setup import build_parts

        stages = [(index, stage.name, stage.steps) for index, stage in enumerate(config.stages)]
        parallel = config.parallel
        with process_group(parallel.timeout_seconds, parallel.shard_ranks, watch) as (ranks, mesh, device):
            check_room(config, inputs, ranks)
            console = BeatingConsole(Console(config.total_steps, stages) if ranks.first else NullConsole(), ranks.pulse)
            with console, closing(build_parts(config, ranks, mesh, device, console, watch)) as parts:
                try:
                    TrainingLoop(config, inputs, parts, ranks, console).run()
                except StoppedAsAsked as stopped:
                    return str(stopped)
    return None


def conclude(config: RunConfig) -> None:
    """Figures, summary.json and the closing table."""
    from rich.console import Console as Terminal

    figures = plot(config.run)
    summary = summarize(read_metrics(config.run))
    write_summary(config.run, summary, provenance())
    Terminal().print(table(summary, figures[0].parent))


if __name__ == "__main__":
    launch.run(main)
