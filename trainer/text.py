"""The model folder's tokenizer, its end tokens, and the run's prompt template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from rollout.template import R1_SYSTEM, encode_prompt
from rollout.types import Prompt
from trainer.config import TemplateConfig


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, exactly as its tokenizer.json says.

    Not AutoTokenizer: for a Qwen2 model it builds that family's own tokenizer and, without a word, puts the family's
    pre-tokenizer in the place of the file's.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def end_tokens(path: Path, tokenizer: Any) -> list[int]:
    """Token ids that end an output: those of generation_config.json or config.json, and the tokenizer's own. Raises InputError
    where there are none."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (path / name).exists():
            value = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= {value} if isinstance(value, int) else set(value or ())
    if not found:
        raise InputError(
            f"{path}: no eos_token_id in generation_config.json, config.json or the tokenizer; an output could never end"
        )
    return sorted(found)


def prompt_encoder(tokenizer: Any, template: TemplateConfig) -> Callable[[Prompt], list[int]]:
    """Prompt → the token ids that an engine is fed."""
    system = R1_SYSTEM if template.system is None else template.system
    return lambda prompt: encode_prompt(tokenizer, prompt.question, system=system, prefill=template.prefill)
