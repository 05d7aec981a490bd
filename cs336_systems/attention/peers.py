"""Other people's attention behind our signature, to be compared with and trained on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run torch's fused attention; torch picks the backend."""
    return _sdpa(q, k, v, is_causal=is_causal, scale=scale)


def sdpa_cudnn(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run cuDNN's fused attention through torch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, is_causal=is_causal, scale=scale)


def sdpa_flash(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run FlashAttention-2 through torch."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, is_causal=is_causal, scale=scale)


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run torch's FlexAttention, compiled; causal tiles come from a cached block mask."""
    mask = _block_mask(q.shape[-2], k.shape[-2], q.device) if is_causal else None
    grouped = q.dim() > 3 and q.shape[-3] != k.shape[-3]
    return _as_heads(_flex_compiled(), q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


def flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run flash-attn-4, which takes (batch, seq, heads, head_dim) and counts causal from the bottom
    right."""
    from flash_attn.cute import flash_attn_func

    if is_causal and q.shape[-2] != k.shape[-2]:
        # Its causal mask is aligned at the last key; ours at the first. Cutting keys makes them
        # agree.
        k, v = (tensor[..., : q.shape[-2], :] for tensor in (k, v))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        result = flash_attn_func(q, k, v, causal=is_causal, softmax_scale=scale)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return _as_heads(run, q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None) -> Tensor:
    grouped = q.dim() > 3 and q.shape[-3] != k.shape[-3]
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": grouped}
    return _as_heads(F.scaled_dot_product_attention, q, k, v, **options)


def _as_heads(function: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Call `function` on (batch, heads, seq, head_dim): some peers take nothing else, sdpa is slow
    on less."""
    shape = q.shape
    q, k, v = (
        tensor.reshape(-1, tensor.shape[-3] if tensor.dim() > 3 else 1, *tensor.shape[-2:])
        for tensor in (q, k, v)
    )
    return function(q, k, v, **kwargs).reshape(shape)


@cache
def _flex_compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(num_queries: int, num_keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, num_queries, num_keys, device=str(device))
