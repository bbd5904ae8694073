"""A Hugging Face model folder: checked before anything heavy is imported, and written again after training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.errors import InputError

if TYPE_CHECKING:
    from trainer.policy import Policy

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
    config_file = path / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{config_file}: missing; a model folder holds config.json, *.safetensors and tokenizer.json") from None
    except OSError as error:
        raise InputError(f"{config_file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise InputError(f"{config_file}: not JSON; fetch the model folder again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ARCHITECTURES:
        raise InputError(f"{config_file}: model_type: {kind!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: no *.safetensors weights; save the model with safetensors into this folder")
    if not (path / "tokenizer.json").exists():
        raise InputError(f"{path}/tokenizer.json: missing; save the model's fast tokenizer into this folder")


def save_model_folder(policy: Policy, source: Path, target: Path, *, first: bool) -> None:
    """Writes the policy's weights, with config and tokenizer of `source`, as a Hugging Face folder. A collective; `first` writes,
    beside and renamed, so that `target` is whole or absent. fp32 weights are kept as fp32."""
    weights = {}
    for name, weight in policy.whole_weights():
        if first:
            weights[name] = weight.cpu().contiguous().clone()
    if not first:
        return
    from safetensors.torch import save_file

    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(weights, beside / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, beside / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
