"""Attention over packed sequences: each document sees itself alone, causally, whatever stands beside it in the micro-batch.

    flash     flash-attn's kernel for sequences of different lengths; where that package is installed
    varlen    torch.nn.attention.varlen, which comes with torch and runs the same algorithm; on GPUs
    sdpa      any machine: sequences of similar length side by side, padded on the right, through one causal SDPA call each. A
              causal row never sees what stands behind it, so right padding needs no mask and changes nothing

Registered with transformers as "keju_packed"; the model gets the `SequenceLayout` as the keyword `layout`.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from rollout.errors import InputError
from trainer.sequence_parallel import SequenceGroup

NAME = "keju_packed"
MIN_FILL = 0.7
"""The shortest sequence of a bucket has at least this share of the longest one's tokens."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How a policy attends. kernel: flash, varlen or sdpa. group: the ranks that share its micro-batches, if any do."""

    kernel: str = "sdpa"
    group: SequenceGroup | None = None


ALONE = Attention()
"""Any machine's, each micro-batch on one rank."""


def attention_kernel(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The one that runs where `model.attention` says `wanted`. Raises InputError where that cannot be."""
    able = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = {
        "flash": able and flash_fault() is None,
        "varlen": able and has_varlen(),
        "sdpa": True,
    }
    if wanted == "auto":
        return next(kernel for kernel, there in installed.items() if there)
    if not installed[wanted]:
        needed = {"flash": flash_fault(), "varlen": "a torch whose varlen_attn has enable_gqa"}
        what = needed[wanted] if able else "a GPU and bfloat16"
        raise InputError(f"model.attention: {wanted} needs {what}; leave it out for the best that is there")
    return wanted


def flash_fault() -> str | None:
    """What it takes to use flash-attn; None where it loads. One that is there may be built for another torch, or be a part of the
    package alone: a warning says so, once."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"the flash-attn that is installed does not load: {why}", stacklevel=2)
        return f"a flash-attn that loads ({why})"
    return None


def has_varlen() -> bool:
    """Whether this torch's own kernel knows all that is asked of it: the first ones had fewer arguments."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where the sequences of a micro-batch of T tokens lie, and what its kernel must know of them."""

    lengths: tuple[int, ...]
    """In packed order; they sum to T."""
    attention: Attention
    buckets: tuple[tuple[int, int, Tensor], ...] = ()
    """sdpa: (sequences n, longest L, rows [n · L] of the packed tokens; a padding place repeats some row of the batch)."""
    restore_T: Tensor | None = None
    """sdpa: where each packed token stands in the buckets laid end to end."""
    ends_N: Tensor | None = None
    """flash, varlen: int32 [sequences + 1], where each sequence begins, and T."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, attention: Attention = ALONE) -> SequenceLayout:
        """lengths: each at least 1."""
        starts = np.cumsum([0, *lengths])
        if attention.kernel != "sdpa":
            return cls(tuple(lengths), attention, ends_N=torch.from_numpy(starts.astype(np.int32)).to(device))
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
        return cls(tuple(lengths), attention, tuple(buckets), torch.from_numpy(restore_T).to(device))


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
    """query [1, heads, t, d], key and value [1, key-value heads, t, d] → ([1, t, heads, d], None).

    t: this rank's share of the layout's T tokens, all of them where the layout has no group.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no mask: the layout says which token sees which")
    tokens = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # [t, heads, d]
    if (group := layout.attention.group) is not None:
        tokens = group.by_heads(*tokens)
    attended = KERNELS[layout.attention.kernel](*tokens, layout, scaling, dropout if module.training else 0.0)
    if group is not None:
        attended = group.by_tokens(attended)
    return attended.unsqueeze(0), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float, dropout: float) -> Tensor:
    outputs = []
    for count, longest, rows in layout.buckets:
        q, k, v = (tensor.index_select(0, rows).unflatten(0, (count, longest)).transpose(1, 2) for tensor in (query, key, value))
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.restore_T)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch.nn.attention.varlen has no dropout; set model.attention to flash or sdpa")
    longest, ends_N = max(layout.lengths), layout.ends_N
    gqa = query.shape[1] != key.shape[1]
    return varlen_attn(
        query, key, value, ends_N, ends_N, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=gqa
    )  # fmt: skip


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float, dropout: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest, ends_N = max(layout.lengths), layout.ends_N
    return flash_attn_varlen_func(
        query, key, value, ends_N, ends_N, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=True
    )


KERNELS = {"flash": _flash, "varlen": _varlen, "sdpa": _sdpa}

AttentionInterface.register(NAME, packed_attention)


def leave_uncompiled() -> None:
    """`torch.compile` runs attention as it is and compiles around it, from now on. (Importing torch's compiler takes seconds.)"""
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
