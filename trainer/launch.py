"""The command line shared by `trainer.train` and `trainer.warmup`: CONFIG, overrides, and how many ranks to start.

Under torchrun a process is one of its ranks. Started plainly, the command checks its input first, so that a mistake is one line
and exit code 2 and not the report of a torchrun whose worker died, and then runs alone or starts torchrun for `--ranks N`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rollout.deadline import EXIT_HUNG
from rollout.errors import InputError, RunStopped
from rollout.process import birth, command_line, die_with
from trainer import cli
from trainer.hang_report import Health
from trainer.report_writer import health_path, report_paths
from trainer.watch import SIGNALS, STOP_FILE, heard

if TYPE_CHECKING:
    from trainer.config import RunConfig

SAY_SECONDS = 20
"""For the rank that tells why nothing is started again."""
END_SECONDS = 60
"""Beyond the deadline of a stop: for its report."""


def parse(module: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """config: Path; overrides: list of key=value; ranks, restarts: int; check: bool; checked: whether another process has
    done it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("config", type=Path, help="the run's YAML, such as configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as actor.lr=1e-6 stages[0].steps=3"
    )
    parser.add_argument(
        "--ranks", type=_positive, default=1, metavar="N", help="start N ranks on this machine through torchrun (default 1)"
    )
    parser.add_argument(
        "--restarts", type=_count, default=0, metavar="N",
        help="where a rank dies or hangs, start all ranks again from the newest checkpoint, at most N times (default 0)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="check configuration, model folder and data, start nothing")
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # by the process that started torchrun
    return parser.parse_intermixed_args(arguments)  # overrides may stand behind an option


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def first_rank() -> bool:
    return rank() == 0


def last_start() -> bool:
    """Whether torchrun will not start this rank again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")


def launch_name() -> str:
    """Names the torchrun of this rank, one on each host, which outlives its restarts, for good; "" for a process that no torchrun
    started."""
    parent = os.getppid()
    return f"{socket.gethostname()}, pid {parent}, born {birth(parent)}" if is_rank() else ""


def first_start(run: Path) -> bool:
    """Whether no rank has said anything yet in this launch. torchrun's own count stays where it starts anew because another
    host came or went."""
    return next(_records(run), None) is None


def _records(run: Path) -> Iterator[Health]:
    """What each rank of this launch said last, before this start."""
    for number in range(world_size()):
        with contextlib.suppress(OSError, ValueError, TypeError):
            health = Health.from_json(health_path(run, number).read_text(encoding="utf-8"))
            if is_rank() and launch_name() in health.launches:
                yield health


def refuse_restart(run: Path) -> None:
    """torchrun starts its ranks anew after any end but a good one. Where the last end in this launch was the run's own, what
    stopped it is still there, and only a person can say that it shall go on: raises RunStopped on the one rank of a host that
    says so, the last time that torchrun tries, and else SystemExit."""
    for health in _records(run):
        if health.of_its_own:
            if last_start() and os.environ.get("LOCAL_RANK", "0") == "0":
                raise RunStopped(
                    f"{run}: not started again, as it stopped of its own: {health.why}; mend that and give the command yourself"
                )
            if last_start():
                time.sleep(SAY_SECONDS)  # whoever ends first has torchrun end the others
            raise SystemExit(health.code)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """`trainer.cli.run`. But a rank that fails among others is gone as soon as it has said why: what the interpreter takes down
    at its end may wait without end for those that sit in a collective (NCCL), and nothing would be restarted."""
    try:
        cli.run(main)
    except SystemExit as end:
        if not end.code or world_size() == 1:
            raise
        code = end.code
    except Exception:
        if world_size() == 1:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def die_with_torchrun() -> None:
    """Called first of all by a rank. Ranks live in sessions of their own, where torchrun's death does not reach them."""
    parent = os.getppid()
    if parent == 1 and "torch" not in command_line(1):
        os._exit(1)  # torchrun is gone already
    die_with(parent)


def torchrun(module: str, options: argparse.Namespace, config: RunConfig | None = None) -> int:
    """Starts `options.ranks` ranks of `python -m module` on this machine and waits. Returns an exit code.

    config: of a run that can be asked to stop. The first signal that would end this process then becomes the file RUN/stop,
    which the ranks obey; without it, and from the second on, torchrun and its ranks are ended, and the exit code is 128 + the
    signal. Where the run fails it is 3 if a rank left the report of a hang, else the ranks' own (2, 3), else torchrun's, which is
    1 whatever happened. Whatever ends this process ends torchrun, and that its ranks (on Linux): they live in sessions of their
    own and would train on.
    """
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command += ["--max-restarts", str(getattr(options, "restarts", 0))]
    command += ["-m", module, str(options.config), *options.overrides, "--checked"]
    environment = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ
    reports: set[Path] = set()
    healths: dict[Path, int] = {}
    if config is not None:
        # Known to torch from 2.13 on; before, whoever signals torchrun itself gets its 30 s.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(config.checkpoint.stop_seconds + END_SECONDS)))
        reports, healths = report_paths(config.run), _written(config.run)
        (config.run / STOP_FILE).unlink(missing_ok=True)
    received: list[int] = []
    here = os.getpid()
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with(here))

    def on_signal(number: int, _frame: object) -> None:
        received.append(number)
        if config is not None and len(received) == 1:
            (config.run / STOP_FILE).touch()
        elif config is None and len(received) == 1:
            process.send_signal(number)
        else:
            process.kill()

    before = {number: signal.signal(number, on_signal) for number in heard(SIGNALS)}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if received and (config is None or len(received) > 1):
        return 128 + received[-1]
    if not code or config is None:
        return code
    return EXIT_HUNG if report_paths(config.run) - reports else _code_of_ranks(config.run, healths) or code


def _written(run: Path) -> dict[Path, int]:
    """When each rank last said something of itself."""
    return {path: path.stat().st_mtime_ns for path in run.glob("health/rank-*.json")}


def _code_of_ranks(run: Path, before: dict[Path, int]) -> int:
    """The exit code that the first rank to say so, since `before`, ended with: torchrun's own is 1 whatever it was."""
    for path, written in sorted(_written(run).items()):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if before.get(path) != written and (code := Health.from_json(path.read_text(encoding="utf-8")).code):
                return code
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"command line: --ranks: {text!r} is not a whole number above 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise InputError(f"command line: --restarts: {text!r} is not a whole number")
    return int(text)
