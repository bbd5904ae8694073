"""The model folder's tokenizer, its end tokens, and the run's prompt template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rollout.model_folder import end_tokens, load_tokenizer
from rollout.template import R1_SYSTEM, encode_prompt
from rollout.types import Prompt
from trainer.config import TemplateConfig

__all__ = ["end_tokens", "load_tokenizer", "prompt_encoder"]


def prompt_encoder(tokenizer: Any, template: TemplateConfig) -> Callable[[Prompt], list[int]]:
    """Prompt → the token ids that an engine is fed."""
    system = R1_SYSTEM if template.system is None else template.system
    return lambda prompt: encode_prompt(tokenizer, prompt.question, system=system, prefill=template.prefill)
