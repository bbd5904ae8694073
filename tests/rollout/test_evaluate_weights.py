"""A model folder as a source of weights: what the file holds, by name, in an order that a transfer can use."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.engine import Decoding, Request
from rollout.errors import InputError
from rollout.evaluate.cli import parser
from rollout.evaluate.engines import build, engine_options
from rollout.model_folder import fingerprint, load_causal_lm
from rollout.transformers_engine import TransformersEngine
from rollout.weights.folder import FolderWeights
from rollout.weights.source import layers
from tests.rollout.tiny_models import greedy_agreement, save, tiny_qwen2


@pytest.fixture
def folder(tmp_path):
    return save(tiny_qwen2(0, tied=False, vocabulary=96, layers=11), tmp_path / "model")


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_comes_once_as_announced(folder):
    source = FolderWeights(folder)
    came = list(source)
    assert [(meta.name, meta.shape, meta.dtype) for meta in source.metadata()] == [
        (name, tuple(tensor.shape), tensor.dtype) for name, tensor in came
    ]
    whole = load_file(folder / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in came} == {name: tensor.tolist() for name, tensor in whole.items()}
    assert [name for name, _ in source] == [name for name, _ in came], "a second pass is the same"


def test_layers_stay_together_over_files(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
    groups = layers(FolderWeights(folder).metadata())
    numbers = [int(group[0].name.split(".")[2]) for group in groups if ".layers." in group[0].name]
    assert numbers == list(range(11))


def test_the_embedded_engine_samples_from_them(folder):
    model = load_causal_lm(folder, torch.float32, "sdpa")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    engine = TransformersEngine(model, end_token_ids=[95], tokens_per_batch=4096)
    engine.load(1, FolderWeights(folder))
    prompts = [torch.randint(0, 95, (9,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).numpy()]
    samples = engine.generate([Request(prompts[0])], Decoding(20, greedy=True))
    agreed, total = greedy_agreement(tiny_qwen2(0, tied=False, vocabulary=96, layers=11), prompts, samples)
    assert agreed == total > 0


def test_an_embedded_engine_may_take_as_long_as_it_needs(folder, tmp_path):
    """Nobody but the person who started it waits, and a prefill on a CPU may take minutes."""
    asked = parser().parse_args([str(folder), "--benchmarks", "x=y"])
    engine, _ = build(asked, 64, [95], tmp_path / "log", print)
    assert engine._silence_seconds is None
    assert engine_options(parser().parse_args([str(folder), "--benchmarks", "x=y", "--engine", "vllm"])).silence_seconds == 300


def test_a_tied_head_and_rotary_frequencies_are_left_out(folder):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "lm_head.weight" in {meta.name for meta in FolderWeights(folder).metadata()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    names = {meta.name for meta in FolderWeights(folder).metadata()}
    assert "lm_head.weight" not in names
    assert not any("inv_freq" in name for name in names)
    assert len(names) == 12 * 11 + 2


def test_what_is_no_plain_model_is_refused(folder):
    rewrite(folder, lambda weights: weights.update({"x": torch.ones(4, dtype=torch.int8)}))
    with pytest.raises(InputError, match="x is I8; only plain weights"):
        FolderWeights(folder)
    rewrite(folder, lambda weights: weights.pop("x"))
    save_file({"model.norm.weight": torch.ones(128)}, folder / "more.safetensors")
    with pytest.raises(InputError, match=r"more\.safetensors: model\.norm\.weight is also in model\.safetensors"):
        FolderWeights(folder)
    (folder / "more.safetensors").write_bytes(b"no header")
    with pytest.raises(InputError, match=r"more\.safetensors: cannot be read as safetensors"):
        FolderWeights(folder)


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    first = fingerprint(folder)
    folder.rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert fingerprint(folder) == first
    (folder / "README.md").write_text("read me")
    assert fingerprint(folder) == first
    (folder / "tokenizer.json").write_text("{ }")
    assert fingerprint(folder) != first
    (folder / "tokenizer.json").write_text("{}")
    rewrite(folder, lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert fingerprint(folder) != first
