"""Attention by many names: one table, one public function, one fp64 truth.

Every row is a function `(q, k, v, *, is_causal, scale) -> o` on tensors (..., heads, seq, head_dim)
or (..., seq, head_dim), differentiable in q, k and v. Causal means that query i sees keys j <= i,
counted from the top left, also when there are more keys than queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cs336_systems.attention.arguments import check_arguments
from cs336_systems.table import Entry, Table

_HERE = "cs336_systems.attention"
_HALF = ("fp16", "bf16")

ATTENTION = Table(
    "attention",
    {
        "scaled_dot_prod_attention": Entry(
            target=f"{_HERE}.plain:scaled_dot_prod_attention",
            summary="the textbook formula, one operation at a time",
        ),
        "vectorized_torch": Entry(
            target=f"{_HERE}.vectorized:vectorized_torch",
            summary="the same formula in as few passes over the scores as eager torch allows",
        ),
        "scaled_dot_prod_attention_compiled": Entry(
            target=f"{_HERE}.compiled:scaled_dot_prod_attention_compiled",
            summary="the textbook formula under torch.compile",
            needs=("compiler",),
        ),
        "vectorized_torch_compiled": Entry(
            target=f"{_HERE}.compiled:vectorized_torch_compiled",
            summary="the vectorised formula under torch.compile",
            needs=("compiler",),
        ),
        "flash_attention_torch": Entry(
            target=f"{_HERE}.flash_torch:flash_attention_torch",
            summary="FlashAttention-2 in plain PyTorch, tile by tile",
        ),
        "flash_attention_torch_compiled": Entry(
            target=f"{_HERE}.flash_torch_compiled:flash_attention_torch_compiled",
            summary="FlashAttention-2 in plain PyTorch, the backward pass's tiles compiled",
            needs=("compiler",),
        ),
        "flash_attention_triton": Entry(
            target=f"{_HERE}.flash_triton:flash_attention_triton",
            summary="FlashAttention-2 as Triton kernels, forward and backward",
            needs=("triton",),
        ),
        "flash_attention_hopper": Entry(
            target=f"{_HERE}.flash_hopper:flash_attention_hopper",
            summary="FlashAttention as warp-specialised kernels for Hopper",
            needs=("cuda", "sm_90a"),
            dtypes=_HALF,
            head_dims=(64, 128),
        ),
        "sdpa": Entry(
            target=f"{_HERE}.peers:sdpa",
            summary="torch's scaled_dot_product_attention, backend of torch's choice",
            peer=True,
        ),
        "sdpa_cudnn": Entry(
            target=f"{_HERE}.peers:sdpa_cudnn",
            summary="torch's scaled_dot_product_attention held to cuDNN",
            needs=("cuda", "sm_80"),
            dtypes=_HALF,
            peer=True,
        ),
        "sdpa_flash": Entry(
            target=f"{_HERE}.peers:sdpa_flash",
            summary="torch's scaled_dot_product_attention held to FlashAttention-2",
            needs=("cuda", "sm_80"),
            dtypes=_HALF,
            peer=True,
        ),
        "flex": Entry(
            target=f"{_HERE}.peers:flex",
            summary="torch's FlexAttention, compiled, with a causal block mask",
            needs=("cuda", "compiler"),
            peer=True,
        ),
        "flash_attn_4": Entry(
            target=f"{_HERE}.peers:flash_attn_4",
            summary="Dao-AILab's FlashAttention-4 in CuTe DSL",
            needs=("package:flash_attn.cute", "cuda", "sm_90"),
            dtypes=_HALF,
            peer=True,
        ),
    },
)

DEFAULT_ATTENTION = "scaled_dot_prod_attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    kind: str = DEFAULT_ATTENTION,
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v by the table's row `kind`.

    Shapes: q (..., num_queries, head_dim), k and v (..., num_keys, head_dim) -> q's shape; with
    (..., heads, seq, head_dim), k and v may have fewer heads, each serving a group of q's.
    `scale` is 1 / sqrt(head_dim) when None.
    Raises: UsageError for an unknown row or arguments that do not fit one another.
    """
    check_arguments(q, k, v)
    return load_attention(kind)(q, k, v, is_causal=is_causal, scale=scale)


def load_attention(kind: str) -> Callable[..., Any]:
    """Return the function of row `kind`."""
    return ATTENTION[kind].load()
