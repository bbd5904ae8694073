"""What torch sees of the GPUs, in a process of its own: `python -m trainer.doctor.gpus` prints JSON. A driver that crashes or
hangs takes that process and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpus:
    """driver: from nvidia-smi, None without one. listed: GPUs it lists. cuda: torch's, None in a build for CPUs. devices: (name,
    bytes, free bytes, capability such as 90) that torch sees; why: where it sees none, torch's own word."""

    driver: str | None
    listed: int
    cuda: str | None
    devices: tuple[tuple[str, int, int, int], ...]
    architectures: tuple[str, ...] = ()
    why: str = ""


def look(seconds: float) -> Gpus:
    driver, listed = _nvidia_smi()
    found = subprocess.run(
        [sys.executable, "-m", "trainer.doctor.gpus"], capture_output=True, text=True, timeout=seconds, check=False
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no word"])[-1]
        return Gpus(driver, listed, None, (), (), f"torch cannot be asked: {last}")
    seen: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    devices = tuple(tuple(device) for device in seen["devices"])
    return Gpus(driver, listed, seen["cuda"], devices, tuple(seen["architectures"]), seen["why"])


def _nvidia_smi() -> tuple[str | None, int]:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None, 0
    versions = [line.strip() for line in lines if line.strip()]
    return (versions[0], len(versions)) if versions else (None, 0)


def main() -> None:
    import torch

    devices, why = [], ""
    try:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
            devices.append([properties.name, properties.total_memory, free, 10 * properties.major + properties.minor])
        if not devices and torch.version.cuda is not None:
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
    architectures = torch.cuda.get_arch_list() if devices else []
    print(json.dumps({"cuda": torch.version.cuda, "devices": devices, "architectures": architectures, "why": why}))


if __name__ == "__main__":
    main()
