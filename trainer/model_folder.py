"""A Hugging Face model folder that is to be trained, and written again afterwards (`rollout.model_folder` reads one)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.errors import InputError
from rollout.model_folder import TOKENIZER_FILES, check_model_folder, is_quantized

if TYPE_CHECKING:
    from trainer.policy import Policy


def check_full_precision_folder(path: Path) -> None:
    """`rollout.model_folder.check_model_folder`, for whatever needs the weights as numbers. Raises InputError, one line, where
    they are quantized, too."""
    check_model_folder(path)
    if is_quantized(path):
        raise InputError(
            f"{path}/config.json: quantization_config: the weights are quantized, and can only be served; name the folder that "
            "they were exported from"
        )


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

    from trainer.disk import refusals

    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with refusals(beside / "model.safetensors"):
        save_file(weights, beside / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, beside / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
