"""One new token's attention is SDPA's, with and without shared key-value heads, padding and a mask."""

import pytest
import torch
from torch.nn import functional

from rollout.decode_attention import decode_attention


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_equals_sdpa(shared, masked, dtype, tolerance):
    torch.manual_seed(0)
    query = torch.randn(3, 6, 1, 8, dtype=dtype)
    key, value = (torch.randn(3, shared, 11, 8, dtype=dtype) for _ in range(2))
    mask = torch.ones(3, 1, 1, 11, dtype=torch.bool) if masked else None
    if masked:
        mask[0, ..., :4] = mask[1, ..., :9] = False  # left padding
    output, _ = decode_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    exact = functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert output.shape == (3, 1, 6, 8)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact.transpose(1, 2), atol=tolerance, rtol=tolerance)
