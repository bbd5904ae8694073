"""A model folder's safetensors as a source of weights: one tensor in memory at a time, no model built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rollout.errors import InputError
from rollout.weights.source import TensorMeta

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_safetensors(path: Path) -> None:
    """Raises InputError unless all *.safetensors in a folder can be read, whatever their dtypes."""
    for file in sorted(path.glob("*.safetensors")):
        _shapes(file)


def left_out(name: str, *, tied: bool) -> bool:
    """Whether a tensor that a folder's files list is none of the model's weights: a head that is tied to the embedding, and
    rotary frequencies, which old checkpoints list and no model takes. tied: config.json's tie_word_embeddings."""
    return (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


class FolderWeights:
    """`rollout.weights.source.WeightSource` of all *.safetensors in a folder, in the order of the layers, but those `left_out`.

    Raises InputError for a file that is no safetensors, a name that comes twice, and weights that are quantised.
    """

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        """device: where the tensors are put; None: a CPU."""
        self._device = str(device or "cpu")
        tied = json.loads((path / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
        self.files: dict[str, Path] = {}
        """In which file each weight lies."""
        metadata = {}
        for file in sorted(path.glob("*.safetensors")):
            for meta in _metadata(file):
                if left_out(meta.name, tied=tied):
                    continue
                if meta.name in metadata:
                    raise InputError(f"{file}: {meta.name} is also in {self.files[meta.name].name}; keep one copy of the weights")
                metadata[meta.name], self.files[meta.name] = meta, file
        self._metadata = [metadata[name] for name in sorted(metadata, key=_order)]

    def metadata(self) -> list[TensorMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        files = dict.fromkeys(self.files.values())
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, framework="pt", device=self._device)) for file in files}
            for meta in self._metadata:
                yield meta.name, opened[self.files[meta.name]].get_tensor(meta.name)


def _metadata(file: Path) -> list[TensorMeta]:
    shapes = _shapes(file)
    for name, (dtype, _) in shapes.items():
        if dtype not in _DTYPES:
            raise InputError(f"{file}: {name} is {dtype}; only plain weights ({', '.join(_DTYPES)}) are read, so unpack it first")
    return [TensorMeta(name, _DTYPES[dtype], shape) for name, (dtype, shape) in shapes.items()]


def _shapes(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor → (dtype as safetensors names it, shape)."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from None


def _order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Layer 10 behind layer 9, whatever file each lies in: a transfer wants the tensors of a layer side by side."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)], name
