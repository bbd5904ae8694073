"""A policy's weights from a model folder into its shards: each rank reads its own rows, and no rank ever holds the model.

    model = empty_causal_lm(path)           # parameters on the meta device: shapes, no memory
    policy = shard(Policy(model), …)        # FSDP2 decides who holds which rows
    load_shards(policy, path, device)       # memory for those rows, filled from the safetensors files

What a rank holds beyond its shards is one slice of one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rollout.errors import InputError
from rollout.model_folder import check_causal_lm
from rollout.weights.folder import FolderWeights
from trainer.attention import NAME as PACKED_ATTENTION

if TYPE_CHECKING:
    from trainer.policy import Policy


def empty_causal_lm(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder that `rollout.model_folder.check_model_folder` accepts: parameters of `dtype` on the meta device,
    buffers (rotary frequencies) as they are computed, on the CPU. Raises InputError for a model that cannot be trained."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)
    model.tie_weights()
    check_causal_lm(model, path)
    return model


@torch.no_grad()
def load_shards(policy: Policy, path: Path, device: torch.device) -> None:
    """Gives a sharded policy its memory, on `device`, and its weights. Every rank for itself; no collective.

    Raises InputError for a weight that is missing, of another shape, or not the model's.
    """
    allocate(policy, device)
    parameters = dict(policy.causal_lm.named_parameters())
    folder = FolderWeights(path)
    check_weights(folder, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, path)
    for name, parameter in parameters.items():
        # Opened anew for each: what a process has read of a file stays mapped, and counts as its memory, until it closes it.
        with safe_open(folder.files[name], framework="pt") as file:
            _fill(parameter, file.get_slice(name))


def allocate(policy: Policy, device: torch.device) -> None:
    """Memory on `device` for a sharded policy's own rows, not filled; its buffers go there as they are."""
    policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


def check_weights(folder: FolderWeights, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises InputError unless a folder holds exactly these weights."""
    found = {meta.name: meta.shape for meta in folder.metadata()}
    for name, shape in shapes.items():
        if name not in found:
            raise InputError(f"{path}: no weight {name} in its *.safetensors; fetch the model folder again")
        if found[name] != shape:
            raise InputError(
                f"{folder.files[name]}: {name} is {list(found[name])}, config.json says {list(shape)}; fetch both again"
            )
    for name in found.keys() - shapes.keys():
        raise InputError(f"{folder.files[name]}: {name} is no weight of the model that config.json describes; fetch both again")


def _fill(parameter: torch.Tensor, stored: Any) -> None:
    """With this rank's rows of a stored tensor, cast to the parameter's dtype."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored[:])
        return
    local = parameter.to_local()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if local.numel():
        local.copy_(stored[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])
