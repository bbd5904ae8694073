"""What one launch needs of the machine: everything its configuration names, looked at before a model is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rollout.cli import EXIT_INPUT
from rollout.errors import InputError
from rollout.reward.judge.verifier import check_endpoint
from rollout.run_lock import RunLock
from rollout.weights.folder import FolderWeights
from trainer.checkpoint_folder import folders_of
from trainer.config import RunConfig
from trainer.doctor.machine import MEMINFO, amount, meminfo
from trainer.doctor.report import Check, Finding, ok, unchecked
from trainer.layers import layer_options
from trainer.planner import architecture
from trainer.planner.cost import state_bytes
from trainer.preflight import check_engine, judge_settings, read, source_key

DISK_BYTES = 128 << 20
"""Written and read to time a disk."""
SLOW_CHECKPOINT = 300.0
"""Seconds that one checkpoint may take before it is worth a word."""
SERVER_SECONDS = 5.0
PREFIX = "keju: error: "


def launch_checks(config: RunConfig, command: list[str], gpus: int, memory: int | None, seconds: float) -> list[Check]:
    """command: the configuration's file and its overrides, for the planner. gpus, memory: of the machine; None on a CPU."""
    return [
        Check("model", lambda: model(config)),
        Check("data", lambda: data(config), 10 * seconds),
        Check("run folder", lambda: run_folder(config.run)),
        Check("disk space", lambda: space(config)),
        Check("disk speed", lambda: speed(config), 3 * seconds),
        Check("host memory", lambda: host_memory(config, gpus, memory is None)),
        Check("judge", lambda: judge(config), 2 * seconds + 120),
        Check("servers", lambda: servers(config), seconds + SERVER_SECONDS * len(config.engine.servers)),
        Check("plan", lambda: plan(command, gpus, memory, 10 * seconds), 10 * seconds + 5),
    ]


def model(config: RunConfig) -> list[Finding]:
    from trainer.model_folder import check_full_precision_folder

    folder = _model_folder(config)
    check_full_precision_folder(folder)
    if folder == config.model.path:
        check_engine(config)
    elements = parameters(folder)
    note = "" if folder == config.model.path else f" (warmup.base; the warm-up writes {config.model.path})"
    return ok("model", f"{folder}: {elements / 1e6:,.1f} M parameters{note}")


def data(config: RunConfig) -> list[Finding]:
    findings, seen = [], set()
    for file in [stage.data.train for stage in config.stages] + list(config.evaluation.sets):
        if source_key(file) in seen:
            continue
        seen.add(source_key(file))
        try:
            findings += ok("data", f"{file.path}: {len(read(file)):,} prompts")
        except InputError as error:
            findings.append(Finding("FAIL", "data", str(error)))
    return findings


def run_folder(run: Path) -> list[Finding]:
    """Nothing is created."""
    if (run / "run.lock").exists():
        RunLock.check(run)
    place = existing(run)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return [Finding("FAIL", "run folder", f"{place} cannot be written to", "name another run folder, or mend its rights")]
    steps = folders_of(run / "checkpoints")
    what = f"goes on from {steps[-1].name}, if that is whole" if steps else "begins anew"
    return ok("run folder", f"{run}: free, can be written to; the run {what}")


def space(config: RunConfig) -> list[Finding]:
    """keep + 1 checkpoints: one is written before the oldest goes."""
    size, count = checkpoint_bytes(config), config.checkpoint.keep + 1
    have = sum(path.stat().st_size for path in (config.run / "checkpoints").rglob("*") if path.is_file())
    return judge_space(shutil.disk_usage(existing(config.run)).free, size, count, have)


def judge_space(free: int, size: int, count: int, have: int = 0) -> list[Finding]:
    """Bytes. size: of one checkpoint; count: at once; have: already there."""
    need = max(0, size * count - have)
    text = f"{amount(free)} free, {count} checkpoints of {amount(size)} need {amount(size * count)}"
    text += f", of which {amount(have)} are there" if have else ""
    if free < need:
        return [Finding("FAIL", "disk space", text, "free some, lower checkpoint.keep, or put run on another disk")]
    if free < 2 * need:
        return [Finding("warn", "disk space", text, "logs, outputs and evaluations come on top")]
    return ok("disk space", text)


def speed(config: RunConfig) -> list[Finding]:
    write, back = disk_speed(existing(config.run))
    return judge_speed(write, back, checkpoint_bytes(config))


def judge_speed(write: float, back: float, size: int) -> list[Finding]:
    """Bytes/s written (fsync included) and read; bytes of one checkpoint."""
    text = (
        f"{write / 1e6:.0f} MB/s written and flushed, {back / 1e6:.0f} MB/s read: a checkpoint takes {size / write:.1f} s or more"
    )
    if size / write > SLOW_CHECKPOINT:
        return [Finding("warn", "disk speed", text, "put run on a faster disk, or raise checkpoint.every")]
    return ok("disk speed", text)


def disk_speed(place: Path) -> tuple[float, float]:
    """Of a file in this folder, which is gone afterwards. Reading asks the kernel to forget its copy first."""
    path = place / f".keju-doctor-{os.getpid()}"
    block = os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - start
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(1 << 20):
                pass
        return DISK_BYTES / written, DISK_BYTES / max(time.perf_counter() - start, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def host_memory(config: RunConfig, gpus: int, cpu: bool) -> list[Finding]:
    """What all ranks of this host, one a GPU, take of its memory together."""
    count = parameters(_model_folder(config))
    weights, moments = state_bytes(config)
    itemsize = compute_bytes(config, cpu)
    parts = {"weights on their way to an engine": count * itemsize}
    if cpu:
        parts |= {"weights, moments and gradients": count * (weights + moments + 4), "an engine's copy": count * itemsize}
    elif config.optimizer.offload:
        parts["offloaded moments"] = count * moments
    if config.model.offload_activations and not cpu:
        parts["offloaded activations"] = gpus * pinned_inputs(config, itemsize)
    if config.checkpoint.asynchronous:
        parts["a checkpoint's copy of weights and moments"] = count * (weights + moments)
    facts = meminfo(MEMINFO)
    if facts is None:
        return unchecked("host memory", f"no {MEMINFO} on this system")
    return judge_memory(facts["MemAvailable"], parts)


def compute_bytes(config: RunConfig, cpu: bool) -> int:
    """Of a number in the dtype in which the policy computes."""
    precision = config.model.precision
    return 4 if precision == "float32" or (cpu and precision == "auto") else 2


def pinned_inputs(config: RunConfig, itemsize: int) -> int:
    """Bytes of one rank's layer inputs in the host's memory, in its largest micro-batch: each is pinned by itself, and torch
    rounds a pinned block up to a power of two."""
    model = architecture.read(_model_folder(config))
    size = layer_options(config).tokens * model["hidden_size"] * itemsize
    return model["num_hidden_layers"] * (1 << (size - 1).bit_length())


def judge_memory(available: float, parts: dict[str, float]) -> list[Finding]:
    need = sum(parts.values())
    text = f"{amount(available)} available, {amount(need)} needed: " + ", ".join(f"{k} {amount(v)}" for k, v in parts.items())
    if available < need:
        return [
            Finding(
                "FAIL",
                "host memory",
                text,
                "a machine with more, checkpoint.asynchronous false, optimizer.kind adamw8bit, model.offload_activations false, "
                "or a smaller model",
            )
        ]
    return ok("host memory", text)


def judge(config: RunConfig) -> list[Finding]:
    if config.reward.judge is None:
        return unchecked("judge", "the configuration has none")
    check_endpoint(judge_settings(config.reward.judge))
    return ok("judge", f"{config.reward.judge.base_url}: {config.reward.judge.model} judges a small question")


def servers(config: RunConfig) -> list[Finding]:
    if config.engine.kind != "vllm-server":
        return unchecked("servers", f"engine.kind is {config.engine.kind}")
    return [finding for address in config.engine.servers for finding in server(address)]


def server(address: str) -> list[Finding]:
    """By /health, which answers without the key."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=SERVER_SECONDS) as answer:
            return ok("servers", f"{address}: up ({answer.status})")
    except (urllib.error.URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        return [Finding("FAIL", "servers", f"{address}: {why}", "start it: python -m rollout.serve")]


def plan(command: list[str], gpus: int, memory: int | None, seconds: float) -> list[Finding]:
    """In a process of its own that sees no GPU."""
    if memory is None:
        return unchecked("plan", "no GPU; see python -m trainer.plan CONFIG --gpus N --memory 80GB")
    arguments = [sys.executable, "-m", "trainer.plan", *command, "--gpus", str(gpus), "--memory", str(memory), "--json"]
    found = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=seconds, check=False
    )
    last = (found.stderr.strip().splitlines() or [""])[-1].removeprefix(PREFIX)
    if found.returncode == EXIT_INPUT:
        return [Finding("FAIL", "plan", last)]
    if found.returncode:
        raise RuntimeError(f"trainer.plan ended with exit code {found.returncode}: {last}")
    return ok("plan", f"fits {gpus} GPUs of {memory / 1e9:.1f} GB")


def parameters(folder: Path) -> int:
    """Numbers in the folder's safetensors, by their headers."""
    return sum(meta.elements for meta in FolderWeights(folder).metadata())


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights and moments; what else is in one is small beside them."""
    return int(parameters(_model_folder(config)) * sum(state_bytes(config)))


def existing(path: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.exists())


def _model_folder(config: RunConfig) -> Path:
    """model.path, or what the warm-up will make it from."""
    made = config.warmup is not None and not config.model.path.exists()
    return config.warmup.base if made else config.model.path
