"""python -m trainer.plot RUN [--out DIR]: the figures of a run, drawn from its metrics.

Data is prepared in `trainer.plot_data` and drawn in `trainer.plot_draw`; the run may still be going on.
"""

import argparse
from pathlib import Path

from rollout.errors import InputError
from trainer.cli import run
from trainer.metrics import read_metrics
from trainer.plot_data import prepare


def plot(run_dir: Path, out: Path | None = None) -> list[Path]:
    """Draw the figures of `run_dir` into `out` (RUN/figures where None) and return the files written.

    Raises InputError for a missing folder or file, a corrupt line, a run without a finished step, or a place that cannot be
    written to.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder; give the folder of a run")
    data = prepare(read_metrics(run_dir))
    out = run_dir / "figures" if out is None else Path(out)
    # Imported here: matplotlib takes a second to load, which bad input need not wait for.
    from trainer.plot_draw import save_figures

    try:
        out.mkdir(parents=True, exist_ok=True)
        return save_figures(data, out)
    except OSError as error:
        raise InputError(f"{out}: cannot write the figures ({error.strerror}); give another folder with --out") from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.plot", description="Draw a run's figures from its metrics.jsonl.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the figures go (default: RUN/figures)")
    arguments = parser.parse_args(argv)
    for path in plot(arguments.run, arguments.out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
