"""The truth: attention with its log-sum-exp and gradients in fp64, written for clarity only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.masks import causal_mask


class Gradients(NamedTuple):
    """Output, log-sum-exp and the three input gradients of one attention call, all fp64."""

    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return O and L in fp64: L is the natural-log log-sum-exp of each row of scaled scores.

    A row that sees no key gives O = 0 and L = -inf.
    Shapes: q (..., num_queries, head_dim), k and v (..., num_keys, head_dim) -> O like q,
        L (..., num_queries). Grouped heads as in `check_arguments`.
    """
    q, k, v = (tensor.double() for tensor in (q, k, v))
    scale = scale_or_default(scale, q.shape[-1])
    k, v = repeat_heads(q, k, v)
    scores = q @ k.transpose(-2, -1) * scale
    if is_causal:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # Where a row sees nothing, -inf - -inf would be NaN; any finite number gives weights of 0.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return weights @ v, lse


def reference_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_output: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Gradients:
    """Return output, log-sum-exp and the gradients of q, k and v in fp64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    o, lse = reference_attention(*leaves, is_causal=is_causal, scale=scale)
    dq, dk, dv = torch.autograd.grad(o, leaves, grad_output.double())
    return Gradients(o.detach(), lse.detach(), dq, dk, dv)
