"""The plain rows under torch.compile; compiled at first use, once a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.vectorized import vectorized_torch


def scaled_dot_prod_attention_compiled(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run the textbook formula as one compiled graph."""
    return _compiled(scaled_dot_prod_attention)(q, k, v, is_causal=is_causal, scale=scale)


def vectorized_torch_compiled(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run the vectorised formula as one compiled graph."""
    return _compiled(vectorized_torch)(q, k, v, is_causal=is_causal, scale=scale)


@cache
def _compiled(function: Callable[..., Tensor]) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)
