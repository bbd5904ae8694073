"""Does what a plan names, runs side by side, and nothing twice: what is done has its mark, and a second call goes on from there.

    WORK/starts/KEY/    data/, base/, warm/ of a start, done.json
    WORK/runs/KEY/      a run's folder as trainer.train leaves it, done.json: seconds and commit

Each worker process trains one run after another through `trainer.train`'s own functions, so that torch is loaded once. A run that
was cut goes on from its checkpoint or begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.recipe.plan import THREADS, Run, Start, config, warmup_config, write_yaml
from benchmarks.recipe.task import write_task
from rollout.environment import commit
from rollout.errors import EngineError, RunStopped
from rollout.run_lock import RunLock
from trainer.metrics import METRICS_FILE, train_rows

DONE = "done.json"


def do(runs: Iterable[Run], work: Path, jobs: int) -> None:
    """Warms up and trains whatever of `runs` is not done. Raises EngineError where a worker ends."""
    runs = {run.key: run for run in runs}
    starts = {run.start.key: run.start for run in runs.values()}
    work.mkdir(parents=True, exist_ok=True)
    with RunLock(work):
        run_all("warm-ups", warm_up, [start for start in starts.values() if not is_done(work / "starts" / start.key)], work, jobs)
        run_all("runs", train, [run for run in runs.values() if not is_done(work / "runs" / run.key)], work, jobs)


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def run_all(name: str, what: Callable[[Any, Path], float], items: list[Any], work: Path, jobs: int) -> None:
    if not items:
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, _pool(jobs) as pool:
        bar = progress.add_task(name, total=len(items))
        try:
            waiting = {pool.submit(what, item, work): item for item in items}
            for number, future in enumerate(_as_completed(waiting), start=1):
                seconds = future.result()
                progress.advance(bar)
                if not console.is_terminal:
                    line = f"{name}: {number} of {len(items)}, {seconds:.0f} s: {waiting[future].key}"
                    print(line, file=sys.stderr, flush=True)
        except BrokenProcessPool:
            raise EngineError(f"{work}: a worker ended in the middle of its {name}; see the newest {work}/runs/*/log") from None
        except BaseException:
            for worker in active_children():  # they would go on with what is queued; what they are at begins anew next time
                worker.kill()
            raise


def _as_completed(futures: Iterable[Future]) -> Iterator[Future]:
    """`concurrent.futures.as_completed`, awake once a second: the system may give a signal to any thread, and Python acts on it
    in the main one, which would sleep until some run is done."""
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        yield from ended


@contextlib.contextmanager
def _pool(jobs: int) -> Iterable[ProcessPoolExecutor]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            yield pool
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


# in a worker


def warm_up(start: Start, work: Path) -> float:
    """Seconds. The folder is made anew: a warm-up is short."""
    from trainer import warmup
    from trainer.config_file import load_config
    from trainer.demo_task import write_base_model

    folder = work / "starts" / start.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    with _quiet(folder / "log"):
        write_task(folder / "data", start.task, start.wording, start.seed)
        write_base_model(folder / "base", folder / "data" / "warmup.jsonl", start.seed)
        path = write_yaml(folder / "warmup.yaml", warmup_config(start, work))
        settings = load_config(path)
        warmup.warm_up(settings, warmup.check(settings, path))
    return _mark(folder, began)


def train(run: Run, work: Path) -> float:
    """Seconds. Raises RunStopped where the run was asked to stop before its last step: it is not done, and goes on next time."""
    from trainer.config_file import load_config
    from trainer.train import run_rank

    folder = work / "runs" / run.key
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with _quiet(folder / "log"):
        settings = load_config(write_yaml(work / "configs" / f"{run.key}.yaml", {"run": str(folder)} | config(run, work)))
        run_rank(settings)
    check_finished(folder, settings.total_steps)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return _mark(folder, began)


def check_finished(folder: Path, steps: int) -> None:
    finished = len(train_rows(folder)) if (folder / METRICS_FILE).exists() else 0
    if finished < steps:
        raise RunStopped(f"{folder}: stopped after {finished} of {steps} steps; the same command goes on")


def _mark(folder: Path, began: float) -> float:
    seconds = time.perf_counter() - began
    (folder / DONE).write_text(json.dumps({"seconds": round(seconds, 1), "commit": commit()}) + "\n", encoding="utf-8")
    return seconds


@contextlib.contextmanager
def _quiet(log: Path) -> Iterable[None]:
    """What a run prints goes into its log; of the file descriptors too, for what native code says."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])
