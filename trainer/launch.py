"""The command line shared by `trainer.train` and `trainer.warmup`: CONFIG, overrides, and how many ranks to start.

Under torchrun a process is one of its ranks. Started plainly, the command checks its input first, so that a mistake is one line
and exit code 2 and not the report of a torchrun whose worker died, and then runs alone or starts torchrun for `--ranks N`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from rollout.errors import InputError


def parse(module: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """config: Path; overrides: list of key=value; ranks: int; check: bool; checked: whether another process has done it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("config", type=Path, help="the run's YAML, such as configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as actor.lr=1e-6 stages[0].steps=3"
    )
    parser.add_argument(
        "--ranks", type=_positive, default=1, metavar="N", help="start N ranks on this machine through torchrun (default 1)"
    )
    parser.add_argument("--check", action="store_true", help="check configuration, model folder and data, start nothing")
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # by the process that started torchrun
    return parser.parse_intermixed_args(arguments)  # overrides may stand behind an option


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def torchrun(module: str, options: argparse.Namespace) -> int:
    """Starts `options.ranks` ranks of `python -m module` on this machine and waits. Returns torchrun's exit code.

    A signal that would end this process goes to torchrun, which ends its ranks: they live in sessions of their own, where neither
    Ctrl-C nor this process's death reaches them, and would train on. The exit code is then 128 + the signal.
    """
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command += ["-m", module, str(options.config), *options.overrides, "--checked"]
    environment = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ
    received: list[int] = []
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 + received[0] if received else code


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"command line: --ranks: {text!r} is not a whole number above 0")
    return int(text)
