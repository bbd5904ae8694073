"""What must hold before anything heavy is imported, and what a measurement was taken on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from rollout.errors import InputError
from rollout.run_lock import RunLock

__all__ = [
    "RunLock",
    "check_packages",
    "commit",
    "cpu_model",
    "expandable_segments",
    "provenance",
    "version_of",
    "without_secrets",
]

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
"""The end of a variable's name, in capitals, whose value is for nobody else."""


def without_secrets(variables: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """What a process is shown that has no use for keys but those in `keep`."""
    return {name: value for name, value in variables.items() if name in keep or not SECRET.search(name.upper())}


def expandable_segments(variables: Mapping[str, str]) -> str | None:
    """The variable that has torch's CUDA allocator take memory which no other process can map; None: there is none."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return next((name for name in names if "expandable_segments:True" in variables.get(name, "")), None)


def check_packages() -> None:
    """Raises InputError where Hugging Face's `kernels` distribution is installed: it and ours claim the same import name, and
    transformers would load one for the other."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise InputError(f"environment: the distribution 'kernels' {version} hides Keju's own package; run: pip uninstall kernels")


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
