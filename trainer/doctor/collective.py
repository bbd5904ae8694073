"""How fast local ranks reduce: processes of their own, NCCL between GPUs, gloo between processes of a CPU.

python -m trainer.doctor.collective BACKEND         (each rank; RANK and the rest in its environment, as torchrun sets it)

bus bandwidth = 2 (n - 1) / n · bytes / seconds     of one all-reduce of `bytes` over n ranks: what a ring sends over each link
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

BYTES = {"nccl": (1 << 20, 1 << 28), "gloo": (1 << 16, 1 << 24)}
"""Messages: 1 MiB and 256 MiB between GPUs, 64 KiB and 16 MiB on a CPU."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Reduced:
    """Best of ROUNDS."""

    bytes: int
    seconds: float
    ranks: int

    @property
    def bus(self) -> float:
        """Bytes/s."""
        return 2 * (self.ranks - 1) / self.ranks * self.bytes / self.seconds


def all_reduce(ranks: int, backend: str, seconds: float) -> list[Reduced]:
    """Times it in `ranks` processes. Raises RuntimeError with the last line of the rank that failed, TimeoutError in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.doctor.collective", backend],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{ranks} ranks did not finish an all-reduce within {seconds:g} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no word"])[-1]
            raise RuntimeError(f"rank {rank} ended with code {process.returncode}: {last}")
    return [Reduced(size, taken, ranks) for size, taken in json.loads(outputs[0][0].splitlines()[-1])]


def main(backend: str) -> None:
    """One rank."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    found = []
    for size in BYTES[backend]:
        numbers = torch.ones(size // 4, dtype=torch.float32, device=device)
        dist.all_reduce(numbers)  # connections are made here
        if not bool((numbers == dist.get_world_size()).all()):
            raise RuntimeError("the all-reduce gave wrong numbers")
        best = float("inf")
        for _ in range(ROUNDS):
            dist.barrier()
            _wait(device)
            start = time.perf_counter()
            dist.all_reduce(numbers)
            _wait(device)
            best = min(best, time.perf_counter() - start)
        found.append([size, best])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1])
