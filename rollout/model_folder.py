"""A Hugging Face model folder as this floor reads it: checked before anything heavy is imported, its tokenizer and end tokens,
the model itself, and a fingerprint of all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ARCHITECTURES = ("qwen2", "qwen3", "llama")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)


def check_model_folder(path: Path) -> None:
    """Raises InputError, one line, unless `path` has a config of a known architecture, safetensors and a fast tokenizer."""
    if not path.is_dir():
        raise InputError(f"{path}: no such model folder; name a Hugging Face folder (or run the command that writes this one)")
    read_config(path, "a model folder holds config.json, *.safetensors and tokenizer.json")
    if not any(path.glob("*.safetensors")):
        other = next((file.name for pattern in PICKLED for file in sorted(path.glob(pattern))), None)
        pickled = f" ({other} is a pickle, which could run any program, and is never read)" if other else ""
        raise InputError(f"{path}: no *.safetensors weights{pickled}; save the model with safetensors into this folder")
    if not (path / "tokenizer.json").exists():
        raise InputError(f"{path}/tokenizer.json: missing; save the model's fast tokenizer into this folder")


def read_config(path: Path, mend: str) -> dict[str, Any]:
    """config.json of a known architecture. Raises InputError; mend: what to do where the file is missing."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing; {mend}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise InputError(f"{file}: not JSON; fetch the model folder again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ARCHITECTURES:
        raise InputError(f"{file}: model_type: {kind!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    return config


def is_quantized(path: Path) -> bool:
    """Whether a model folder's weights are stored quantized, for an engine that loads them as they are (`trainer.export --format
    fp8` writes such a folder). Its config.json can be read."""
    return bool(json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config"))


def longest_context(config: dict[str, Any]) -> int | None:
    """Tokens that a model's positions reach, from its config.json: scaled rotary frequencies (YaRN and the like) reach further
    than those it was first trained on. None where it does not say."""
    positions = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}  # the latter in transformers 5
    first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if positions is None or not isinstance(factor, int | float) or scaling.get("rope_type", scaling.get("type")) == "default":
        return positions
    return max(positions, int((first or positions) * factor))


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


def load_causal_lm(path: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model of a folder that `check_model_folder` accepts, on the CPU, in `dtype`. attention: as transformers names it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per rank over fifty tensors is noise among the run's own lines
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    check_causal_lm(model, path)
    return model


def check_causal_lm(model: nn.Module, path: Path) -> None:
    """Raises InputError for what neither training nor sampling supports."""
    other = {kind for kind in getattr(model.config, "layer_types", None) or [] if kind != "full_attention"}
    if other:
        raise InputError(f"{path}/config.json: layer_types {sorted(other)} are not supported; only full_attention is")
    if model.config.model_type == "qwen3" and getattr(model.config, "attention_bias", False):
        raise InputError(f"{path}/config.json: attention_bias is not supported for qwen3: vLLM's has no bias behind attention")
    if model.lm_head.bias is not None:
        raise InputError(f"{path}/config.json: an lm_head with a bias is not supported")


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits over the content of all that decides what the model says: weights, configurations, tokenizer."""
    names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    files = [path / name for name in names if (path / name).exists()] + sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name}\n{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
