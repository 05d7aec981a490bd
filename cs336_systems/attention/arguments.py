"""What every row may rely on: arguments that fit one another, and heads that match."""

from __future__ import annotations

import math

from torch import Tensor

from cs336_systems.errors import bad


def check_arguments(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise the UsageError that names what does not fit between q, k and v.

    Shapes: q (..., num_queries, head_dim), k and v (..., num_keys, head_dim). From four dimensions
    on the third from the end is the heads, and k and v may have fewer, a divisor of q's.
    """
    if q.dim() < 2:
        raise bad(
            "attention", "query", "have at least 2 dimensions (seq, head_dim)", tuple(q.shape)
        )
    if not q.is_floating_point():
        raise bad("attention", "query", "have a floating-point dtype", q.dtype)
    for name, tensor in (("key", k), ("value", v)):
        _check_leading(name, q, tensor)
        if tensor.dtype != q.dtype:
            raise bad("attention", name, f"have dtype {q.dtype}", tensor.dtype)
        if tensor.device != q.device:
            raise bad("attention", name, f"be on {q.device}", str(tensor.device))
        if tensor.shape[-1] != q.shape[-1]:
            raise bad("attention", name, f"have head dim {q.shape[-1]}", tensor.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        if v.shape[-2] != k.shape[-2]:
            raise bad("attention", "value", f"have {k.shape[-2]} keys", v.shape[-2])
        raise bad("attention", "value", f"have {k.shape[-3]} heads as key has", v.shape[-3])


def _check_leading(name: str, q: Tensor, tensor: Tensor) -> None:
    grouped = q.dim() > 3
    same = slice(None, -3) if grouped else slice(None, -2)
    if tensor.dim() != q.dim() or tensor.shape[same] != q.shape[same]:
        rule = f"have leading dimensions {tuple(q.shape[same])}"
        raise bad("attention", name, rule, tuple(tensor.shape))
    if grouped and tensor.shape[-3] != q.shape[-3]:
        heads = tensor.shape[-3]
        if heads == 0 or q.shape[-3] % heads:
            rule = f"have a number of heads that divides the query's {q.shape[-3]}"
            raise bad("attention", name, rule, heads)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v with each head repeated for the group of query heads that it serves.

    Source: Ainslie et al. 2023 (grouped-query attention); query head h uses key head h // group.
    """
    if q.dim() < 4 or q.shape[-3] == k.shape[-3]:
        return k, v
    group = q.shape[-3] // k.shape[-3]
    return k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)


def scale_or_default(scale: float | None, head_dim: int) -> float:
    """Return `scale`, or 1 / sqrt(head_dim) when it is None."""
    return 1 / math.sqrt(max(head_dim, 1)) if scale is None else float(scale)
