"""Attention of one new token on a CPU, for the embedded engine.

PyTorch's CPU kernel for scaled dot-product attention is written for long queries; with a query of one token it takes several
times as long as two small batched GEMMs, above all in bf16. The query heads that share a key-value head are the GEMM's rows, so
keys and values are not repeated. Prompts, and other devices, go to transformers' own SDPA. Registered as "keju_decode".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "keju_decode"


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, L, d], key and value [B, key-value heads, S, d], mask [B or 1, 1, L, S] boolean, True where a token is
    seen, or None → ([B, L, heads, d], None). The softmax is fp32."""
    batch, heads, length, dim = query.shape
    if length > 1 or not query.is_cpu:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    shared = key.shape[1]
    scores = query.reshape(batch, shared, heads // shared, dim) @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(batch, 1, heads, dim), None


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
