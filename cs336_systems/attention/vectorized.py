"""The same formula in as few passes over the scores as eager torch allows.

Scale and mask ride on the product (`baddbmm`), the softmax is torch's single fused pass, and
nothing else of size (num_queries, num_keys) is made: two such tensors live at once instead of the
textbook's six.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.masks import causal_mask


def vectorized_torch(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v with one batched product, one softmax, one product."""
    scale = scale_or_default(scale, q.shape[-1])
    k, v = repeat_heads(q, k, v)
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    q3, k3, v3 = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, k, v))
    if is_causal:
        bias = q.new_zeros(num_queries, num_keys)
        bias.masked_fill_(~causal_mask(num_queries, num_keys, q.device), float("-inf"))
        scores = torch.baddbmm(bias, q3, k3.transpose(-2, -1), alpha=scale)
    else:
        scores = torch.bmm(q3 * scale, k3.transpose(-2, -1))
    weights = torch.softmax(scores, dim=-1)
    return torch.bmm(weights.to(v.dtype), v3).view(q.shape)
