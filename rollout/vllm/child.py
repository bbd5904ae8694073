"""Starts, asks and ends the process that holds a colocated vLLM (`rollout.vllm.worker`). The rank's side; imports no vLLM.

The process is exec'd, never forked: vLLM inside a rank hangs, or rewires the rank's process. It sees none of torchrun's
variables, which would make it join the trainer's group.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from rollout.engine import EngineError
from rollout.environment import without_secrets
from rollout.vllm.channel import Channel, ChannelClosed, Message
from rollout.vllm.settings import PACK_VARIABLE, VllmSettings

SCRUBBED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PET_", "OMP_", "TORCH_NCCL_")
"""Beginnings of the variables that the process is not shown."""
SEND_SECONDS = 300.0
"""How long it may take nothing of what it is sent; it reads between two steps of decoding."""
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
"""On a CPU a reload frees large blocks and takes the same again. Kept by the process, on huge pages, they do not have to be
touched for the first time at each push, which took half of it."""
QUIET_SECONDS = 5.0
"""How long a process that was asked to go may take."""


class VllmChild:
    """One process. Construction returns at once; `wait_ready` waits until the engine can be asked.

    name: for messages, such as "rank 1's vLLM". log: where its output goes. threads: OpenMP's, of each worker, on a CPU.
    """

    def __init__(self, name: str, settings: VllmSettings, log: Path, *, threads: int = 1, device: str | None = None) -> None:
        self.name, self._log = name, log
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.vllm.worker", str(theirs.fileno())],
                env=environment(threads, device, settings.tensor_parallel, pack_weights=settings.pack_weights),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._channel = Channel(ours, SEND_SECONDS)
        self._ready = False
        self._send("settings", settings=settings.to_json())

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, seconds: float) -> None:
        """Raises EngineError where the engine does not come up in time."""
        if not self._ready:
            self.expect("ready", seconds, "start")
            self._ready = True

    def ask(self, kind: str, seconds: float, *, expected: str = "done", **fields: object) -> Message:
        """Sends a message and waits for its answer."""
        self._send(kind, **fields)
        return self.expect(expected, seconds, kind)

    def send(self, kind: str, *, arrays: dict[str, np.ndarray] | None = None, **fields: object) -> None:
        """Sends a message; the answers come through `receive`."""
        self._send(kind, arrays=arrays, **fields)

    def receive(self, seconds: float, call: str) -> Message | None:
        """The next message, None where there is none within `seconds`. Raises EngineError where the process is gone or
        refuses."""
        try:
            message = self._channel.receive(seconds)
        except ChannelClosed:
            raise self._lost(call) from None
        if message is not None and message["kind"] == "refused":
            raise EngineError(f"{self.name}: {call} refused: {message['why']} (log: {self._log})")
        return message

    def expect(self, kind: str, seconds: float, call: str) -> Message:
        """The next message of this kind; what else comes (progress, samples of an aborted generation) is dropped."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            message = self.receive(max(0.0, deadline - time.monotonic()), call)
            if message is not None and message["kind"] == kind:
                return message
        raise EngineError(f"{self.name}: no answer to {call} within {seconds:g} s (log: {self._log})")

    def kill(self) -> None:
        """At once, and waits until it is gone."""
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def close(self) -> None:
        """Closes the channel, which ends the process; kills it where that takes too long."""
        self._channel.close()
        try:
            self._process.wait(QUIET_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _send(self, kind: str, **fields: object) -> None:
        try:
            self._channel.send(kind, **fields)
        except ChannelClosed:
            raise self._lost(kind) from None

    def _lost(self, call: str) -> EngineError:
        try:
            code = self._process.wait(QUIET_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EngineError(f"{self.name}: its process ended ({how}) during {call} (log: {self._log})")


def environment(threads: int, device: str | None, workers: int = 1, *, pack_weights: bool = True) -> dict[str, str]:
    """What the process sees. device: the GPUs it may use, as CUDA_VISIBLE_DEVICES lists them; None on a CPU. workers: tensor
    parallel. pack_weights: see `rollout.vllm.loading`."""
    place = cpu_variables(workers, pack_weights=pack_weights) if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return common_environment(threads) | place


def common_environment(threads: int, keep: Collection[str] = ()) -> dict[str, str]:
    """What any process of vLLM sees, on a GPU and on a CPU. keep: the keys among its variables that it needs."""
    kept = {name: value for name, value in without_secrets(os.environ, keep).items() if not name.startswith(SCRUBBED)}
    return kept | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would not import our main module, which it must
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def cpu_variables(workers: int, *, pack_weights: bool) -> dict[str, str]:
    """What it sees besides on a CPU."""
    return {
        "GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), MALLOC))),
        PACK_VARIABLE: str(int(pack_weights)),
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled there but a sampler's detail, for seconds
    } | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if workers > 1 else {})  # else it wants a NUMA node for each
