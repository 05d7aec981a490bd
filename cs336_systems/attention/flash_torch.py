"""FlashAttention-2 in plain PyTorch: the tiled algorithm, to be read before the Triton kernels.

The scores exist one tile at a time, so that memory grows with the sequence and not with its square.
Batch and heads are batched by torch; only the sequence is tiled. Tiles are held and multiplied in
the accumulation dtype, in which products of half-precision values are exact.
Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336_systems.attention.arguments import check_arguments, scale_or_default
from cs336_systems.attention.autograd import (
    autocast_inputs,
    distinct,
    fix_lengths,
    forbid_second_derivative,
    without_autocast,
)


class Tiles(NamedTuple):
    """How many queries and how many keys make one tile of scores."""

    queries: int
    keys: int


class TileGradients(NamedTuple):
    """What one tile of scores adds to the three gradients."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


TILES = Tiles(256, 256)


def flash_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v, tile by tile, forward and backward."""
    return FlashAttentionTorch.apply(q, *distinct(k, v), is_causal, scale)


class FlashAttentionTorch(torch.autograd.Function):
    """Tiled attention that keeps q, k, v, O and L for its backward pass, nothing quadratic.

    L is the natural-log log-sum-exp of each row of scaled scores; -inf where a row sees no key.
    Under torch.compile all tiles become one graph, of which torch keeps what it likes: scores, too.
    Shapes: q (..., num_queries, head_dim), k and v (..., num_keys, head_dim) -> O like q, and L
        (..., num_queries) in the accumulation dtype. Grouped heads as in `check_arguments`.
    Cost: forward 4 * num_queries * num_keys * head_dim FLOPs a head, backward 2.5 times that;
        half when causal.
    Raises: UsageError for arguments that do not fit one another; RuntimeError when differentiated
        twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        scale: float | None = None,
        tiles: Tiles = TILES,
    ) -> Tensor:
        fix_lengths(q, k)
        ctx.input_dtypes = (q.dtype, k.dtype, v.dtype)
        q, k, v = autocast_inputs(q, k, v)
        check_arguments(q, k, v)
        ctx.is_causal, ctx.scale, ctx.tiles = is_causal, scale_or_default(scale, q.shape[-1]), tiles
        with without_autocast(q.device):
            o, lse = flash_forward(q, k, v, is_causal=is_causal, scale=ctx.scale, tiles=tiles)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradients(ctx, do, tile_gradients)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Return O in q's dtype and L in the accumulation dtype.

    Source: Dao 2023, algorithm 1.
    """
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    grouped_q, grouped_o, grouped_lse = (_grouped(x, k) for x in (q, o, lse[..., None]))
    for rows in _slices(0, q.shape[-2], tiles.queries):
        o_i, lse_i = _attend(grouped_q, k, v, rows, tiles.keys, is_causal, scale)
        for whole, tile in ((grouped_o, o_i), (grouped_lse, lse_i)):
            block = _block(whole, rows)
            block.copy_(tile.reshape(block.shape))
    return o, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, key_tile: int, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O_i and L_i of one tile of queries, visiting the tiles of keys that it may see.

    Source: Milakov and Gimelshein 2018, algorithm 3 (online softmax).
    """
    q_i = _query_tile(q, rows)
    m_i = torch.full_like(q_i[..., :1], float("-inf"))
    l_i = torch.zeros_like(m_i)
    acc = torch.zeros_like(q_i)
    last_key = min(rows.stop, k.shape[-2]) if is_causal else k.shape[-2]
    for keys in _slices(0, last_key, key_tile):
        k_j, v_j = _key_tile(k, keys), _key_tile(v, keys)
        s_ij = _scores(q_i, k_j, scale, *_diagonal(q, rows, keys, is_causal))
        m_new = torch.maximum(m_i, s_ij.amax(dim=-1, keepdim=True))
        base = _finite(m_new)
        p_ij = torch.exp(s_ij - base)
        rescale = torch.exp(m_i - base)
        l_i = rescale * l_i + p_ij.sum(dim=-1, keepdim=True)
        acc = rescale * acc + p_ij @ v_j
        m_i = m_new
    return acc / l_i.masked_fill(l_i == 0, 1.0), m_i + torch.log(l_i)


def flash_backward(
    saved: tuple[Tensor, ...],
    do: Tensor,
    *,
    is_causal: bool,
    scale: float,
    tiles: Tiles,
    step: Callable[..., TileGradients],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv from `saved` q, k, v, O and L, recomputing the weights tile by tile.

    Source: Dao 2023, algorithm 2.
    """
    q, k, v, o, lse = saved
    dtype = accumulation_dtype(q.dtype)
    # Every tile of keys adds to dq, which is therefore summed in full; dk and dv are done with one.
    dq, dk, dv = torch.zeros_like(q, dtype=dtype), torch.empty_like(k), torch.empty_like(v)
    d = (do.to(dtype) * o.to(dtype)).sum(dim=-1, keepdim=True)
    per_query = [_grouped(x, k) for x in (q, do, lse[..., None], d)]
    grouped_dq = _grouped(dq, k)
    for keys in _slices(0, k.shape[-2], tiles.keys):
        k_j, v_j = _key_tile(k, keys), _key_tile(v, keys)
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        # The first tile of queries that holds one as far along as the first of these keys.
        first_row = keys.start // tiles.queries * tiles.queries if is_causal else 0
        for rows in _slices(first_row, q.shape[-2], tiles.queries):
            diagonal = _diagonal(per_query[0], rows, keys, is_causal)
            query_tiles = [_query_tile(x, rows) for x in per_query]
            added = step(*query_tiles, k_j, v_j, scale, *diagonal)
            block = _block(grouped_dq, rows)
            block.add_(added.dq.reshape(block.shape))
            dk_j += added.dk
            dv_j += added.dv
        for whole, tile in ((dk, dk_j), (dv, dv_j)):
            block = _block(whole, keys)
            block.copy_(tile.reshape(block.shape))
    return dq.to(q.dtype), dk, dv


def tile_gradients(
    q_i: Tensor,
    do_i: Tensor,
    lse_i: Tensor,
    d_i: Tensor,
    k_j: Tensor,
    v_j: Tensor,
    scale: float,
    query_index: Tensor | None,
    key_index: Tensor | None,
) -> TileGradients:
    """Return what one tile adds to dq, dk and dv; D is rowsum(dO * O).

    Shapes: q_i and do_i (batch, rows, head_dim), lse_i and d_i (batch, rows, 1), k_j and v_j
        (batch, keys, head_dim); the indices as `_diagonal` gives them.
    """
    p_ij = torch.exp(_scores(q_i, k_j, scale, query_index, key_index) - _finite(lse_i))
    ds_ij = p_ij * (do_i @ v_j.mT - d_i) * scale
    return TileGradients(ds_ij @ k_j, ds_ij.mT @ q_i, p_ij.mT @ do_i)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores, sums and gradients of `dtype` inputs are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(
    q_i: Tensor, k_j: Tensor, scale: float, query_index: Tensor | None, key_index: Tensor | None
) -> Tensor:
    s_ij = (q_i @ k_j.mT) * scale
    if query_index is None or key_index is None:
        return s_ij
    return s_ij.masked_fill(query_index[:, None] < key_index[None, :], float("-inf"))


def _diagonal(
    q: Tensor, rows: slice, keys: slice, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the position of each row and key of a tile that the causal diagonal crosses.

    Every query of another tile sees every key, and its scores need no mask: (None, None).
    """
    if not is_causal or keys.stop - 1 <= rows.start:
        return None, None
    group = q.shape[-3]
    query_index = torch.arange(rows.start, rows.stop, device=q.device).repeat(group)
    return query_index, torch.arange(keys.start, keys.stop, device=q.device)


def _finite(maximum: Tensor) -> Tensor:
    """Replace -inf, as of a row that sees nothing, by 0: -inf - -inf would be NaN, not -inf."""
    return maximum.masked_fill(maximum == float("-inf"), 0.0)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield the tiles of a sequence; the last may be shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """View (..., heads, seq, dim) as (..., key heads, group, seq, dim), one group per head of k.

    Source: Ainslie et al. 2023 (grouped-query attention).
    """
    if x.dim() < 4 or x.shape[-3] == k.shape[-3]:
        return x.unsqueeze(-3)
    return x.unflatten(-3, (k.shape[-3], x.shape[-3] // k.shape[-3]))


def _block(x: Tensor, positions: slice) -> Tensor:
    return x[..., positions, :]


def _query_tile(x: Tensor, rows: slice) -> Tensor:
    """Return a tile (..., group, rows, dim) as (batch, group * rows, dim): a group shares keys, so
    its heads are more rows of one product."""
    tile = _block(x, rows)
    num_rows = tile.shape[-3] * tile.shape[-2]
    return _accumulable(tile).reshape(math.prod(tile.shape[:-3]), num_rows, tile.shape[-1])


def _key_tile(x: Tensor, keys: slice) -> Tensor:
    """Return a tile (..., keys, dim) as (batch, keys, dim)."""
    tile = _block(x, keys)
    return _accumulable(tile).reshape(math.prod(tile.shape[:-2]), *tile.shape[-2:])


def _accumulable(tile: Tensor) -> Tensor:
    return tile.to(accumulation_dtype(tile.dtype))


def input_gradients(
    ctx: Any, do: Tensor, step: Callable[..., TileGradients]
) -> tuple[Tensor | None, ...]:
    """Run the backward pass in full precision and return gradients in the inputs' dtypes."""
    saved = ctx.saved_tensors
    with torch.no_grad(), without_autocast(do.device):
        gradients = flash_backward(
            saved, do, is_causal=ctx.is_causal, scale=ctx.scale, tiles=ctx.tiles, step=step
        )
    cast = tuple(x.to(dtype) for x, dtype in zip(gradients, ctx.input_dtypes, strict=True))
    return *forbid_second_derivative(cast, do, *saved[:3]), None, None, None
