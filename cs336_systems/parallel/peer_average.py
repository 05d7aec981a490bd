"""The average of one part of the gradients, from a rank's own memory and from its inbox."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _average_kernel(
    own_ptr,
    others_ptr,
    result_ptr,
    numel,
    stride,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add in ranks' order, 16-bit numbers in fp32, and round once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    own = tl.load(own_ptr + at, mask=inside)
    wide = tl.float64 if own.dtype == tl.float64 else tl.float32
    total = tl.zeros((BLOCK,), wide)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            value = own
        else:
            row = rank if rank < RANK else rank - 1
            value = tl.load(others_ptr + row * stride + at, mask=inside)
        # From 0 on, -0 would become 0.
        total = value.to(wide) if rank == 0 else total + value.to(wide)
    if RANKS & (RANKS - 1) == 0:
        total = total * (1.0 / RANKS)
    elif wide == tl.float64:
        total = total / RANKS
    else:  # Triton's own division is an approximation.
        total = tl.div_rn(total, tl.full((BLOCK,), RANKS, tl.float32))
    total = total.to(own.dtype)
    tl.store(own_ptr + at, total, mask=inside)
    tl.store(result_ptr + at, total, mask=inside)


def average(own: Tensor, others: Tensor, result: Tensor, rank: int) -> None:
    """Put the average into `own`, which is of `rank`, and into `result`.

    Shapes: own and result (numel,), others (world_size - 1, numel) with rows of any stride.
    """
    numel = own.numel()
    _average_kernel[(triton.cdiv(numel, _BLOCK),)](
        own,
        others,
        result,
        numel,
        others.stride(0),
        RANK=rank,
        RANKS=len(others) + 1,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
