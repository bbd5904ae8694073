"""What an engine needs, checked before anything is loaded."""

import importlib.util
import json

import pytest

from rollout.errors import InputError
from rollout.prompts import PromptSource
from rollout.types import Prompt
from trainer.config import RunConfig
from trainer.preflight import Inputs, check_engine, check_rule


def config_of(folder, kind, context=96, engine=(), **model):
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    stage = {"name": "one", "steps": 1, "context": context, "data": {"train": {"path": "x"}, "max_prompt_tokens": 32}}
    return RunConfig.model_validate(
        {"run": "r", "model": {"path": folder}, "engine": {"kind": kind, **dict(engine)}, "stages": [stage]}
    )


def test_a_context_beyond_the_models_positions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_engine(config_of(tmp_path, "vllm", max_position_embeddings=96))
    with pytest.raises(InputError, match=r"max_position_embeddings: 95 is less than the 96 tokens"):
        check_engine(config_of(tmp_path, "vllm", max_position_embeddings=95))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
    check_engine(config_of(tmp_path, "vllm", max_position_embeddings=24, rope_scaling=yarn))
    check_engine(config_of(tmp_path, "vllm", max_position_embeddings=24, rope_parameters=yarn))
    with pytest.raises(InputError, match=r"max_position_embeddings: 95 is less"):
        check_engine(config_of(tmp_path, "vllm", max_position_embeddings=95, rope_parameters={"rope_type": "default"}))
    with pytest.raises(InputError, match=r"max_position_embeddings: 92 is less"):
        check_engine(config_of(tmp_path, "vllm", max_position_embeddings=24, rope_scaling=yarn | {"factor": 3.84}))
    check_engine(config_of(tmp_path, "transformers", max_position_embeddings=95))


def test_a_missing_vllm_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"engine\.kind: vllm needs the package vllm"):
        check_engine(config_of(tmp_path, "vllm"))
    check_engine(config_of(tmp_path, "transformers"))


def test_heads_that_cannot_be_shared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_engine(config_of(tmp_path, "vllm", engine={"tensor_parallel": 2}, num_attention_heads=14))
    with pytest.raises(InputError, match=r"^engine\.tensor_parallel: 4 does not divide the model's 14 attention heads"):
        check_engine(config_of(tmp_path, "vllm", engine={"tensor_parallel": 4}, num_attention_heads=14))


@pytest.mark.parametrize("kind", ["transformers", "vllm-server"])
def test_only_a_colocated_vllm_is_shared(tmp_path, kind):
    with pytest.raises(ValueError, match="tensor_parallel is for kind vllm"):
        config_of(tmp_path, kind, engine={"tensor_parallel": 2, "servers": ["http://127.0.0.1:1"]})


def test_a_puzzle_that_the_rule_cannot_score_is_refused(tmp_path):
    config = config_of(tmp_path, "transformers")
    metadata = {"source_dataset": "propositional_logic"}
    good, bad = Prompt("a", "?", "1", metadata={"source_dataset": "chain_sum"}), Prompt("b", "?", "1", metadata=metadata)
    for_judge = Prompt("c", "?", "1", metadata={**metadata, "judge": True})
    inputs = Inputs({"train.jsonl": PromptSource([good, bad, for_judge], seed=1)}, {})
    check_rule(config, inputs)
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"rule": "reasoning-gym"})})
    check_rule(config, Inputs({"train.jsonl": PromptSource([good, for_judge], seed=1)}, {"held out": [good]}))
    for wrong, place in ((inputs, "train.jsonl"), (Inputs({}, {"held out": [bad]}), "held out")):
        with pytest.raises(InputError, match=rf"^{place}: prompt b: .*'propositional_logic' cannot be scored"):
            check_rule(config, wrong)
