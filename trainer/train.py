"""`torchrun -m trainer.train CONFIG [key=value …]`: the whole run, stage after stage, from where its folder left off.

Started plainly it trains on one rank, or with `--ranks N` hands itself to torchrun.
"""

from __future__ import annotations

from contextlib import closing

from trainer import cli, launch
from trainer.config import RunConfig
from trainer.config_file import dump_config, load_config
from trainer.console import Console, NullConsole
from trainer.environment import RunLock
from trainer.metrics import read_metrics
from trainer.plot import plot
from trainer.preflight import check_run
from trainer.summary import summarize, table, write_summary


def main(arguments: list[str]) -> int:
    options = launch.parse("trainer.train", "Train a policy by reinforcement learning, stage after stage.", arguments)
    config = load_config(options.config, options.overrides)
    if launch.is_rank():
        return run_rank(config)
    if options.check or options.ranks > 1:
        inputs = check_run(config)
        RunLock(config.run).release()
        if options.check:
            print(f"{options.config}: {sum(len(source) for source in inputs.sources.values())} prompts, {config.total_steps} steps: fine")
            return 0
        return launch.torchrun("trainer.train", options)
    return run_rank(config)


def run_rank(config: RunConfig) -> int:
    """This process's part of a run. Rank 0 checks and reads the inputs and owns the run folder."""
    inputs = None
    if launch.first_rank():
        inputs = check_run(config)
        lock = RunLock(config.run)
        dump_config(config, config.run / "config.yaml")
    from trainer.distributed import process_group
    from trainer.loop import TrainingLoop
    from trainer.setup import build_parts

    stages = [(index, stage.name, stage.steps) for index, stage in enumerate(config.stages)]
    with process_group(config.parallel.timeout_seconds) as (ranks, mesh, device):
        console = Console(config.total_steps, stages) if ranks.first else NullConsole()
        parts = build_parts(config, ranks, mesh, device, console.phase)
        with console, closing(parts):
            TrainingLoop(config, inputs, parts, ranks, console).run()
    if inputs is not None:
        conclude(config)
        lock.release()
    return 0


def conclude(config: RunConfig) -> None:
    """Figures, summary.json and the closing table."""
    from rich.console import Console as Terminal

    figures = plot(config.run)
    summary = summarize(read_metrics(config.run))
    write_summary(config.run, summary)
    Terminal().print(table(summary, figures[0].parent))


if __name__ == "__main__":
    cli.run(main)
