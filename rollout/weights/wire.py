"""How tensors lie in a transfer buffer, and what is said about each: the chunk, one JSON object an engine can check and load.

    {"buffer": {"path": "/proc/41/fd/9", "bytes": 268435456},            or another of rollout.weights.transport's
     "tensors": [{"name": "model.norm.weight", "dtype": "float32", "shape": [64], "offset": 0, "bytes": 256, "checksum": 12…}, …]}
    {"abandon": "why"}                                                   nothing more comes of this push

float8: a matrix is e4m3 with one fp32 scale per output channel behind it ("scale": {"offset", "bytes", "checksum"}); the engine
multiplies back into its own dtype. Embeddings, heads, norms and biases travel in the engine's dtype.

What the checksums prove: the trainer's is of the bytes that it meant, taken on their way into the buffer; the engine's is of the
buffer from which it loads, which nobody writes from then until it has answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.checksum import checksum, copy_checksum
from rollout.weights.buffers import aligned
from rollout.weights.source import TensorMeta, layers
from rollout.weights.transport import Buffer

Wire = Literal["engine", "float8"]
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its chunk's buffer. `scale_offset` is None but for float8."""

    meta: TensorMeta
    dtype: torch.dtype
    offset: int
    scale_offset: int | None = None

    @property
    def nbytes(self) -> int:
        return self.meta.elements * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes if self.scale_offset is None else self.scale_offset + 4 * self.meta.shape[0]


def plan(metadata: list[TensorMeta], dtype: torch.dtype, wire: Wire, least_bytes: int) -> list[list[Place]]:
    """Chunks of whole layers, as many as fit into `least_bytes`, at least one: an engine assembles a layer when its last tensor
    has come, and a layer torn apart would be assembled from a buffer that is written anew."""
    chunks: list[list[Place]] = []
    for group in layers(metadata):
        alone = _layout(group, dtype, wire, 0)
        if chunks and aligned(chunks[-1][-1].end) + alone[-1].end <= least_bytes:
            chunks[-1] += _layout(group, dtype, wire, aligned(chunks[-1][-1].end))
        else:
            chunks.append(alone)
    return chunks


def largest(chunks: Sequence[Sequence[Place]]) -> int:
    """Bytes a buffer must have."""
    return max((chunk[-1].end for chunk in chunks), default=0)


def write(tensor: Tensor, place: Place, buffer: Buffer) -> dict[str, Any]:
    """Copies one whole tensor into its place, converting on the way; what is to be said about it.

    The checksum is of the bytes that were meant, taken while they are written, not of what the buffer holds afterwards (on a CPU;
    see `kernels.checksum.copy_checksum`). On a CPU with as many threads as torch has.
    """
    entry = {
        "name": place.meta.name,
        "dtype": str(place.dtype).removeprefix("torch."),
        "shape": list(place.meta.shape),
        "offset": place.offset,
        "bytes": place.nbytes,
    }
    if place.scale_offset is None:
        return entry | {"checksum": _put(tensor, place.dtype, buffer, place.offset)}
    weight, scale = quantize(tensor)
    return entry | {
        "checksum": _put(weight, FLOAT8, buffer, place.offset),
        "scale": {
            "offset": place.scale_offset,
            "bytes": 4 * scale.numel(),
            "checksum": _put(scale, torch.float32, buffer, place.scale_offset),
        },
    }


def check(entry: dict[str, Any], buffer: Tensor) -> None:
    """Raises ValueError where the bytes of a chunk's entry are not those that were sent. buffer: uint8, a CPU's or a GPU's."""
    parts = [(entry["name"], entry)]
    if "scale" in entry:
        parts.append((f"{entry['name']}, its scale", entry["scale"]))
    for what, part in parts:
        if checksum(_bytes(part, buffer), threads=torch.get_num_threads()) != part["checksum"]:
            raise ValueError(mismatch(what, part))


def mismatch(what: str, part: dict[str, Any]) -> str:
    """What is said where a checksum differs."""
    return f"{what}: the {part['bytes']} bytes received are not those sent (checksum)"


def read(entry: dict[str, Any], buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of a chunk's entry that was checked: a view of the buffer, but for float8 a new tensor in `dtype`."""
    tensor = _bytes(entry, buffer).view(getattr(torch, entry["dtype"])).view(entry["shape"])
    if "scale" in entry:
        tensor = dequantize(tensor, _bytes(entry["scale"], buffer).view(torch.float32), dtype)
    return tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], scale fp32 [N]): each output channel's largest magnitude becomes e4m3's largest number."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / FLOAT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale.unsqueeze(1)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`: `quantize`, undone but for its rounding."""
    return (weight.float() * scale.unsqueeze(1)).to(dtype)


def _layout(group: list[TensorMeta], dtype: torch.dtype, wire: Wire, offset: int) -> list[Place]:
    places = []
    for meta in group:
        if wire == "float8" and len(meta.shape) == 2 and ".layers." in meta.name:
            place = Place(meta, FLOAT8, offset, aligned(offset + meta.elements))
        else:
            place = Place(meta, dtype, offset)
        places.append(place)
        offset = aligned(place.end)
    return places


def _put(tensor: Tensor, dtype: torch.dtype, buffer: Buffer, offset: int) -> int:
    """Into the buffer from `offset` on, as `dtype`; the checksum."""
    target = buffer.bytes[offset : offset + tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape)
    return copy_checksum(tensor.contiguous(), target, threads=torch.get_num_threads())


def _bytes(part: dict[str, Any], buffer: Tensor) -> Tensor:
    return buffer[part["offset"] : part["offset"] + part["bytes"]]
