"""The prompt as the model sees it: template, system message, prefill, and no special token twice."""

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rollout.errors import InputError
from rollout.template import R1_SYSTEM, encode_prompt

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / os.environ.get("KEJU_TEST_DATA", "../shared/data")
CHAT = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ opening }}{% endif %}"
)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and <s> as a special token that is added by default, as many real tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = template
    return tokenizer


def render(template: str, **arguments: str) -> str:
    tokenizer = byte_tokenizer(template)
    return tokenizer.decode(encode_prompt(tokenizer, "1+1?", **arguments), skip_special_tokens=False)


def test_system_question_prefill_in_order():
    assert render(CHAT, system="Think.", prefill="<think>\n") == "<s>[system]Think.[user]1+1?[assistant]<think>\n"


def test_empty_system_gives_no_system_message():
    assert render(CHAT, system=" ", prefill="") == "<s>[user]1+1?[assistant]"


@pytest.mark.parametrize("opening", ["<think>\\n", "<think>"])
def test_prefill_is_not_doubled_where_the_template_opens_the_block(opening):
    template = CHAT.replace("{{ opening }}", opening.replace("\\n", "{{ '\\n' }}"))
    text = render(template, system="", prefill="<think>\n")
    assert text.count("<think>") == 1
    assert text.rstrip().endswith("[assistant]<think>")


def test_no_chat_template_names_the_model(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(InputError, match="no chat template") as caught:
        encode_prompt(tokenizer, "q", system="", prefill="")
    assert str(tmp_path) in str(caught.value)


def test_template_that_refuses_a_system_message_is_an_input_error():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}" + CHAT
    assert render(refusing, system="", prefill="")
    with pytest.raises(InputError, match="system and user") as caught:
        render(refusing, system="s", prefill="")
    assert "\n" not in str(caught.value)


def test_r1_system_names_the_four_tags_in_order():
    places = [R1_SYSTEM.index(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    assert places == sorted(places)


def test_real_qwen_tokenizer(tmp_path):
    """Qwen's template writes a system message of its own where none is given; ours must replace it."""
    folder = DATA / "tokenizers" / "qwen2.5"
    if not folder.exists():
        pytest.skip(f"no test data at {folder} (set KEJU_TEST_DATA)")
    core = Tokenizer.from_buffer(gzip.decompress((folder / "tokenizer.json.gz").read_bytes()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    text = tokenizer.decode(encode_prompt(tokenizer, "1+1?", system=R1_SYSTEM, prefill="<think>\n"))
    expected = f"<|im_start|>system\n{R1_SYSTEM}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert text == expected
