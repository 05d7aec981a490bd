"""The tiled attention in plain PyTorch with a compiled backward pass.

Compiled is the work of one tile, for tiles of any size: the graph is small however long the
sequence, nothing quadratic is held, and torch's compiler fuses what lies between the products.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cs336_systems.attention.autograd import distinct
from cs336_systems.attention.flash_torch import (
    FlashAttentionTorch,
    TileGradients,
    input_gradients,
    tile_gradients,
)


def flash_attention_torch_compiled(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v, tile by tile; the backward pass's tiles compiled."""
    return FlashAttentionTorchCompiled.apply(q, *distinct(k, v), is_causal, scale)


class FlashAttentionTorchCompiled(FlashAttentionTorch):
    """`FlashAttentionTorch` with a compiled backward pass."""

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradients(ctx, do, compiled_tile_gradients)


def compiled_tile_gradients(*args: Any) -> TileGradients:
    """Run `tile_gradients` as one compiled graph: one with the mask, one without, at any size."""
    if torch.compiler.is_compiling():
        return tile_gradients(*args)
    return _compiled()(*(_of_any_size(x) if isinstance(x, Tensor) else x for x in args))


@cache
def _compiled() -> Any:
    # Not fullgraph: past torch's limit on recompilations (a size of 1 takes one) tiles run eagerly,
    # which is slower but no error.
    return torch.compile(tile_gradients, dynamic=True)


def _of_any_size(x: Tensor) -> Tensor:
    """Copy a tile such that the graph compiled for it holds for others.

    Views are guarded by what they view, and sizes that happen to be equal are taken to be one.
    """
    x = x.clone(memory_format=torch.contiguous_format)
    torch._dynamo.maybe_mark_dynamic(x, list(range(x.dim())))
    return x
