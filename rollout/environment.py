"""What must hold before anything heavy is imported, one writer a run folder, and what a measurement was taken on."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from rollout.errors import InputError

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
"""The end of a variable's name, in capitals, whose value is for nobody else."""


def without_secrets(variables: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """What a process is shown that has no use for keys but those in `keep`."""
    return {name: value for name, value in variables.items() if name in keep or not SECRET.search(name.upper())}


def check_packages() -> None:
    """Raises InputError where Hugging Face's `kernels` distribution is installed: it and ours claim the same import name, and
    transformers would load one for the other."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise InputError(f"environment: the distribution 'kernels' {version} hides Keju's own package; run: pip uninstall kernels")


class RunLock:
    """Exclusive use of a run folder, at most as long as this process lives: the kernel drops the lock with the process, so none
    goes stale.

    Raises InputError naming the owner where another living process holds it.
    """

    def __init__(self, run: Path) -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = open(run / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 (held open is what holds the lock)
        except OSError as error:
            raise InputError(f"{run}: run: cannot be used as a run folder ({error.strerror}); name another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise InputError(f"{run}: run: in use by a living run ({owner}); stop it or name another run folder") from None
        except OSError as error:
            raise InputError(f"{run}: run: its file system cannot lock ({error.strerror}); name another run folder") from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()


def provenance() -> dict[str, str]:
    """What a measurement was taken on and with: for every result file. The commit is "-dirty" where the tree differs from it."""
    versions = {name: version_of(name) for name in ("torch", "transformers", "numpy", "reasoning-gym", "math-verify")}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **versions,
    }


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "absent"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit that runs, "-dirty" where the tree differs from it; "unknown" outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
