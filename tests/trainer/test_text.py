"""The tokenizer is the folder's own, and what ends an output is known."""

import json

import pytest

from rollout.errors import InputError
from trainer.demo_task import write_base_model, write_problems
from trainer.text import end_tokens, load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_problems(folder / "data", seed=0)
    write_base_model(folder / "base", folder / "data" / "warmup.jsonl", seed=0)
    return folder / "base"


def test_tokenizer_json_is_followed_to_the_letter(base):
    # Qwen2's own pre-tokenizer, which transformers would put here, splits 12 into digits.
    assert load_tokenizer(base).tokenize("next 12 + 6 is 18") == ["next", "Ġ12", "Ġ+", "Ġ6", "Ġis", "Ġ18"]


def test_end_tokens_are_those_of_all_three_places(base, tmp_path):
    tokenizer = load_tokenizer(base)
    own = tokenizer.eos_token_id
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end_tokens(tmp_path, tokenizer) == sorted({own, 5, 7, 8})
    tokenizer.eos_token = None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="could never end"):
        end_tokens(tmp_path, tokenizer)
