"""From a question to the token ids that an engine is fed: the system prompt of R1's recipe in our words, through the model's chat
template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollout.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R1_SYSTEM = (
    "A user asks a question and the assistant answers it. The assistant first thinks the problem through, step by step, and only "
    "then gives the user its answer. The thinking stands inside <think> </think> and the answer inside <answer> </answer>, like "
    "this: <think> the thinking </think> <answer> the answer </answer>"
)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, system: str, prefill: str) -> list[int]:
    """The prompt's token ids: chat template with the generation prompt, then `prefill` (the start of the assistant's turn).

    system: the system message; blank for none. prefill: e.g. "<think>\\n"; it is not added where the template itself ends with it
    (compared without white space at the ends: R1's own template opens the block). The template writes the special tokens, so
    tokenising adds none.

    Raises InputError where the model folder has no chat template, or where its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: the model folder has no chat template; add chat_template.jinja to "
            "it, or chat_template to its tokenizer_config.json"
        )
    messages = [{"role": "user", "content": question}]
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    text = _render(tokenizer, messages)
    if not text.rstrip().endswith(prefill.strip()):
        text += prefill
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = " and ".join(message["role"] for message in messages)
        why = " ".join(str(error).split())
        raise InputError(
            f"{tokenizer.name_or_path}: the chat template refuses a {roles} message ({why}); some allow no system message: "
            "leave it empty"
        ) from None
