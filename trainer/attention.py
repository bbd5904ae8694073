"""Attention over packed sequences: each document sees itself alone, causally, whatever stands beside it in the micro-batch.

Sequences of similar length are laid side by side, padded on the right, and go through one causal SDPA call: a causal row never
sees what stands behind it, so right padding needs no mask and changes nothing. Registered with transformers as "keju_packed"; the
model gets the `SequenceLayout` as the keyword `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

NAME = "keju_packed"
MIN_FILL = 0.7
"""The shortest sequence of a bucket has at least this share of the longest one's tokens."""


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where the sequences of a micro-batch of T tokens lie, and how they are laid side by side for attention."""

    lengths: tuple[int, ...]
    """In packed order; they sum to T."""
    buckets: tuple[tuple[int, int, Tensor], ...]
    """(sequences n, longest L, rows [n · L] of the packed tokens; a padding place repeats some row of the batch)."""
    restore_T: Tensor
    """Where each packed token stands in the buckets laid end to end."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> SequenceLayout:
        """lengths: each at least 1."""
        starts = np.cumsum([0, *lengths])
        restore_T = np.empty(starts[-1], dtype=np.int64)
        buckets, offset = [], 0
        for members in _buckets(lengths):
            longest = lengths[members[0]]
            rows = np.zeros((len(members), longest), dtype=np.int64)
            for at, index in enumerate(members):
                tokens = np.arange(lengths[index])
                rows[at, : lengths[index]] = starts[index] + tokens
                restore_T[starts[index] : starts[index + 1]] = offset + at * longest + tokens
            offset += rows.size
            buckets.append((len(members), longest, torch.from_numpy(rows.reshape(-1)).to(device)))
        return cls(tuple(lengths), tuple(buckets), torch.from_numpy(restore_T).to(device))


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of similar length together, longest first."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if buckets and lengths[index] >= MIN_FILL * lengths[buckets[-1][0]]:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: SequenceLayout,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, key-value heads, T, d] → ([1, T, heads, d], None)."""
    if attention_mask is not None:
        raise ValueError("packed attention takes no mask: the layout says which token sees which")
    tokens = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    outputs = []
    for count, longest, rows in layout.buckets:
        q, k, v = (tensor.index_select(0, rows).unflatten(0, (count, longest)).transpose(1, 2) for tensor in tokens)
        attended = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout if module.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.restore_T).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
