"""The process that `python -m rollout.serve` becomes: vLLM's own OpenAI-compatible server, with what rollouts need.

    python -m rollout.vllm.server_plugin SETTINGS      (one JSON object, `ServeSettings`)

vLLM spawns its engine core and workers, and a spawned Python process first imports its parent's main module, this one: so every
process of the server, and no other, registers the weight-transfer engine, and dies with the process that started it.
Imports vLLM in `main` and in those processes only.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from rollout.vllm.settings import LEAST_FRACTION, kv_cache_bytes

KEY_VARIABLE = "KEJU_API_KEY"
OPEN_PATH = "/health"
"""The one route that is answered without the key: load balancers ask it, and it says nothing."""
PREFILL_TOKENS = 8192
"""On a CPU: prompt tokens computed at once, at least a whole longest one."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `rollout.serve` was asked for, checked. model: folder. dtype: "auto" is bfloat16 on a GPU and float32 on a CPU. load:
    the folder's weights; else random ones, until a push."""

    model: str
    host: str
    port: int
    dtype: str
    max_model_len: int
    max_sequences: int
    kv_cache_gib: float | None
    tensor_parallel: int
    quantization: str | None
    load: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServeSettings:
        return cls(**json.loads(text))


def vllm_arguments(settings: ServeSettings, *, cpu: bool) -> list[str]:
    """vLLM's command line."""
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if cpu else "bfloat16"
    arguments = {
        "--model": settings.model,
        "--host": settings.host,
        "--port": str(settings.port),
        "--dtype": dtype,
        "--max-model-len": str(settings.max_model_len),
        "--max-num-seqs": str(settings.max_sequences),
        "--tensor-parallel-size": str(settings.tensor_parallel),
        "--load-format": "safetensors"
        if settings.load
        else "dummy",  # random: what a push leaves out cannot pass for the policy's
        "--logprobs-mode": "processed_logprobs",  # under the distribution sampled from, temperature included
        "--generation-config": "vllm",  # not the folder's: it may hold a repetition penalty
        "--weight-transfer-config": json.dumps({"backend": "keju"}),
        "--middleware": "rollout.vllm.server_plugin.KeyGuard",
        "--seed": "0",
    }
    if settings.quantization is not None:
        arguments["--quantization"] = settings.quantization
    cache = _cache_bytes(settings, dtype, cpu=cpu)
    if cache is not None:
        arguments |= {"--kv-cache-memory-bytes": str(cache), "--gpu-memory-utilization": str(LEAST_FRACTION)}
    has_tokenizer = any((Path(settings.model) / name).exists() for name in TOKENIZER_FILES)
    token_route = "--enable-scale-out" if has_tokenizer else "--tokens-only"  # without a tokenizer there is nothing else
    flags = ["--enable-prefix-caching", "--disable-uvicorn-access-log", token_route]
    if cpu:
        # A request with a seed dies there when its prompt is cut: vLLM would wind back its generator, which CPUs' cannot.
        arguments["--max-num-batched-tokens"] = str(max(settings.max_model_len, PREFILL_TOKENS))
        flags += ["--no-enable-chunked-prefill", "--enforce-eager"]
    else:
        flags.append("--enable-chunked-prefill")
    return [part for pair in arguments.items() for part in pair] + flags


def _cache_bytes(settings: ServeSettings, dtype: str, *, cpu: bool) -> int | None:
    """None: what vLLM takes of a GPU's memory by itself."""
    if settings.kv_cache_gib is not None:
        return int(settings.kv_cache_gib * 2**30)
    if not cpu:
        return None
    config = json.loads((Path(settings.model) / "config.json").read_text(encoding="utf-8"))
    return kv_cache_bytes(config, 4 if dtype == "float32" else 2, settings.max_sequences, settings.max_model_len)


Message = dict[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: without the bearer key of KEJU_API_KEY, nothing but /health is answered; vLLM's own --api-key leaves the
    weight routes open to everyone. No key in the environment: all is answered (`rollout.serve` then binds to loopback only)."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        self._expected = hashlib.sha256(f"Bearer {key}".encode()).digest() if key else None

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or self._admitted(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "the key is missing or wrong"}}'})

    def _admitted(self, scope: Message) -> bool:
        if self._expected is None or scope["path"] == OPEN_PATH:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Digests are compared, so that the time says nothing about the key, its length included.
        return len(given) == 1 and hmac.compare_digest(hashlib.sha256(given[0]).digest(), self._expected)


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C. Raises InputError."""
    settings = ServeSettings.from_json(arguments[0])
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    if cpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled there but a sampler's detail, for seconds
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if settings.quantization not in (None, *QUANTIZATION_METHODS):
        raise InputError(f"--quantization {settings.quantization}: vLLM knows {', '.join(QUANTIZATION_METHODS)}")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_arguments(settings, cpu=cpu))
    validate_parsed_serve_args(parsed)
    try:
        uvloop.run(run_server(parsed))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise InputError(f"--port {settings.port}: in use on {settings.host}; name another") from None
    return 0


def prepare_child() -> None:
    """In each process that vLLM spawns, before anything else of it runs."""
    die_with_parent()
    from rollout.vllm.transfer import register

    register()


def die_with_parent(parent: int | None = None) -> None:
    """The kernel kills this process when the thread that started it ends, however it ends. Linux. parent: the process that did,
    where it may be gone before this is called."""
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    # The module by its own name, not this copy of it: vLLM imports KeyGuard from there.
    from rollout.cli import run
    from rollout.vllm import server_plugin

    run(server_plugin.main)
if __name__ == "__mp_main__":
    prepare_child()
