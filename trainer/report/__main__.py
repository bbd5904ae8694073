"""python -m trainer.report RUN [RUN…] [--out FILE.html]: one HTML file to look at a run with, or at several beside each other.

The runs may still be going on. What could not be read of the samples is said on stderr and in the page.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rollout.cli import Parser, number
from rollout.errors import InputError
from trainer.cli import run
from trainer.report.curves import read_run
from trainer.report.page import write_page
from trainer.report.sample_files import plan_reading, survey
from trainer.report.sample_store import SampleStore

PAGE_FILE = "report.html"
SAMPLES = 50_000
MOST_SAMPLES = 500_000  # a browser's list cannot be higher
MEGABYTES = 96


def report(
    runs: list[Path],
    out: Path | None = None,
    *,
    samples: int = SAMPLES,
    megabytes: int = MEGABYTES,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Path, tuple[str, ...]]:
    """Write the page (the first run's report.html where `out` is None); returns (its path, what could not be read).

    samples, megabytes: about what the page may hold and weigh; beyond that groups are left out evenly over the steps, and the
    page says so. Raises InputError for a run without a folder, metrics or a finished step, and for a place that cannot be
    written to.
    """
    runs = [Path(each) for each in runs]
    for folder in runs:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the folder of a run")
    names = run_names(runs)
    data = [read_run(folder, name) for folder, name in zip(runs, names, strict=True)]
    surveys = [survey(folder, progress) for folder in runs]
    plan = plan_reading(surveys, samples, megabytes)
    store = SampleStore()
    for place, (folder, each) in enumerate(zip(runs, surveys, strict=True)):
        store.add_run(place, folder, each, plan, progress)
    out = runs[0] / PAGE_FILE if out is None else Path(out)
    try:
        write_page(out, data, store)
    except OSError as error:
        raise InputError(f"{out}: cannot write the page ({error.strerror}); give another file with --out") from error
    return out, tuple(store.notes)


def run_names(runs: list[Path]) -> list[str]:
    """The folders' names, longer from the right by as many parents as tell them apart. Example: a/x, b/x → a/x, b/x."""
    parts = [folder.resolve().parts for folder in runs]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m trainer.report", description="One HTML file to look at a run with.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; several are laid over each other")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=f"the page (default: {PAGE_FILE} in the first run)")
    samples = number(f"number from 1 to {MOST_SAMPLES:,}", int, lambda value: 0 < value <= MOST_SAMPLES)
    positive = number("number", int, lambda value: value > 0)
    parser.add_argument("--samples", type=samples, default=SAMPLES, help="at most about so many samples (default: %(default)s)")
    parser.add_argument("--megabytes", type=positive, default=MEGABYTES, help="about the page's limit (default: %(default)s)")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    live = sys.stderr.isatty()

    def show(line: str) -> None:
        print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    out, notes = report(arguments.runs, arguments.out, samples=arguments.samples, megabytes=arguments.megabytes, progress=show)
    if live:
        show("")
    for note in notes:
        print(f"keju: {note}", file=sys.stderr)
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    run(main)
