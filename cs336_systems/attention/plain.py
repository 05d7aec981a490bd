"""The textbook formula, one operation at a time: the version everything else is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.masks import causal_mask


def scaled_dot_prod_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v, holding all (num_queries, num_keys) intermediates.

    Source: Vaswani et al. 2017, equation 1.
    """
    scale = scale_or_default(scale, q.shape[-1])
    k, v = repeat_heads(q, k, v)
    scores = (q @ k.transpose(-2, -1)) * scale
    if is_causal:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    # The maximum cancels, so it takes no gradient. Letting autograd through it is wrong under
    # torch.compile in bf16: the fused backward recomputes the scores unrounded, finds none equal
    # to the maximum, and divides by 0.
    weights = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(v.dtype) @ v
