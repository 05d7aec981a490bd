"""Which tile each Triton attention kernel works on: an explicit table, with its measured reasons.

Keyed by architecture, dtype and head dimension. Times are of one H200; for other architectures the
tiles are those that compile to the fewest spilled registers (`compile_only` shows them) and fit the
99 KiB of shared memory that the smallest GPU of the kind has. With CS336_AUTOTUNE=1 in the
environment `autotune` measures some others against them, and the fastest is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

ROWS_MULTIPLE = 128
"""What every `block_m` divides, so that the dQ buffer has no partial tile."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one kernel is compiled."""

    block_m: int
    """Queries in a tile."""
    block_n: int
    """Keys in a tile."""
    num_warps: int
    num_stages: int
    """How many loads ahead the compiler pipelines."""
    tma: bool = False
    """Let the tensor memory accelerator load; needs sm_90 and strides of whole 16 bytes."""
    hold: bool = False
    """Keep left operands that stay the same all along the loop in registers; with TMA only, and
    only where `compile_only` finds that the assembler does not overwrite them."""
    most_registers: int | None = None
    """A thread's, where the compiler would take a few more than let another program in beside."""
    spilled_bytes: int = 0
    """What of a thread's registers goes to local memory: 0 wherever a tile without was found."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of all kernels for one kind of input."""

    forward: Tile
    long_forward: Tile | None = None
    """For more keys than LONG, and wherever no key is masked."""
    one_pass: Tile | None = None
    """dQ, dK and dV together; None where two passes are faster, or one would spill."""
    keys: Tile
    """dK and dV of two passes."""
    queries: Tile
    """dQ of two passes."""

    def forward_for(self, num_keys: int, is_causal: bool) -> Tile:
        """Return the forward pass's tile for so many keys."""
        long = num_keys > LONG or not is_causal
        return self.long_forward if self.long_forward and long else self.forward


LONG = 4096
"""Above it the GPU is at its power limit, where larger tiles, which move less, run faster."""


def _tile(m: int, n: int, warps: int, stages: int, *, tma: bool = False, spilled: int = 0) -> Tile:
    return Tile(
        block_m=m, block_n=n, num_warps=warps, num_stages=stages, tma=tma, spilled_bytes=spilled
    )


def _tma(m: int, n: int, warps: int, stages: int, *, spilled: int = 0, **how: Any) -> Tile:
    return replace(_tile(m, n, warps, stages, tma=True, spilled=spilled), **how)


# By the padded head dim. Few queries to a tile and one warp group each: three programs share a
# multiprocessor, and one's softmax runs under another's products.
_HOPPER_HALF = {
    16: Tiles(
        forward=_tma(64, 64, 4, 3),
        # 1.85 ms, and 0.01 after it; two passes 1.15 and 0.78.
        one_pass=_tma(64, 64, 4, 3),
        keys=_tma(64, 64, 4, 3),
        queries=_tma(64, 64, 4, 3),
    ),
    32: Tiles(
        forward=_tma(64, 64, 4, 3),
        # 1.39 and 0.96 ms; in one pass 2.70, and 0.02 after it.
        keys=_tma(64, 64, 4, 3),
        queries=_tma(64, 64, 4, 3),
    ),
    64: Tiles(
        # B1 H16 S16384 causal: 1.12 ms; 64x64 without TMA 1.19, 128x128 with 8 warps 1.50.
        forward=_tma(64, 128, 4, 2),
        # 1.95 and 1.39 ms; in one pass 3.57, and 0.03 after it. Not causal, where 172 registers
        # would be taken and two programs run instead of three: 3.93, 4.84 without the limit.
        keys=_tma(64, 64, 4, 3, most_registers=168),
        queries=_tma(64, 64, 4, 2),
    ),
    128: Tiles(
        # In bursts 1.99 ms, 128x128 with 8 warps 2.08; for a second on end 2.30 and 2.21. Not
        # causal 4.71 and 4.41, at B8 S2048 0.64 and 0.62, there causal 0.34 and 0.35.
        forward=_tma(64, 64, 4, 3),
        long_forward=_tma(128, 128, 8, 3),
        # 3.58 and 2.50 ms; without holding operands two stages fit: 3.75 and 2.76. In one pass
        # 6.43 with 32x64, and 0.08 before and after.
        keys=_tma(64, 64, 4, 3, hold=True),
        queries=_tma(64, 64, 4, 3, hold=True),
    ),
    256: Tiles(
        # B4 H16 S4096 causal: 1.06 ms; 64x64 1.14.
        forward=_tma(128, 64, 8, 2),
        # 3.94 and 1.83 ms; without holding operands 6.21, 64x64 with 8 warps 2.93.
        keys=_tma(32, 64, 8, 2, hold=True),
        queries=_tma(64, 32, 4, 3),
    ),
}
_HOPPER_SINGLE = {
    32: Tiles(forward=_tma(128, 64, 8, 3), keys=_tma(32, 64, 4, 2), queries=_tma(64, 32, 4, 2)),
    64: Tiles(
        # B1 H16 S4096 causal: 0.54 ms; 64x64 0.57.
        forward=_tma(128, 64, 8, 3),
        # 1.43 and 1.13 ms.
        keys=_tma(32, 128, 8, 2),
        queries=_tma(64, 32, 4, 2),
    ),
    128: Tiles(
        forward=_tma(64, 32, 4, 2, spilled=32),
        keys=_tile(16, 64, 8, 2),
        queries=_tile(64, 16, 8, 2),
    ),
    256: Tiles(
        forward=_tile(64, 16, 8, 1, spilled=48),
        keys=_tile(16, 16, 8, 1, spilled=248),
        queries=_tile(16, 16, 8, 1, spilled=256),
    ),
}
_PORTABLE_HALF = {
    32: Tiles(
        forward=_tile(64, 64, 4, 3),
        one_pass=_tile(32, 64, 4, 3),
        keys=_tile(64, 64, 4, 2),
        queries=_tile(64, 64, 4, 2),
    ),
    64: Tiles(
        forward=_tile(64, 64, 4, 3),
        one_pass=_tile(32, 64, 4, 3),
        keys=_tile(32, 64, 4, 2),
        queries=_tile(64, 32, 4, 2),
    ),
    128: Tiles(
        forward=_tile(64, 64, 4, 3),
        keys=_tile(64, 64, 8, 2),
        queries=_tile(64, 64, 8, 2),
    ),
    256: Tiles(
        forward=_tile(64, 32, 8, 2),
        keys=_tile(32, 32, 8, 2),
        queries=_tile(32, 32, 4, 2),
    ),
}
_PORTABLE_SINGLE = {
    32: Tiles(
        forward=_tile(32, 32, 4, 2),
        keys=_tile(32, 32, 4, 2, spilled=16),
        queries=_tile(32, 32, 4, 2),
    ),
    64: Tiles(
        forward=_tile(32, 32, 4, 2),
        keys=_tile(16, 32, 4, 2),
        queries=_tile(32, 32, 4, 1),
    ),
    128: Tiles(
        forward=_tile(32, 16, 4, 2),
        keys=_tile(16, 32, 4, 1, spilled=88),
        queries=_tile(32, 16, 4, 1, spilled=128),
    ),
    256: Tiles(
        forward=_tile(16, 16, 4, 1, spilled=208),
        keys=_tile(16, 16, 4, 1, spilled=536),
        queries=_tile(16, 16, 4, 1, spilled=600),
    ),
}

# Triton's interpreter takes its time by the tile, whatever its size.
_INTERPRETED = Tiles(
    forward=_tile(64, 32, 4, 2),
    one_pass=_tile(32, 64, 4, 2),
    keys=_tile(32, 64, 4, 2),
    queries=_tile(64, 32, 4, 2),
)


def head_pad(head_dim: int) -> int:
    """Return the columns of a tile: a power of two, and no fewer than products take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(q: Tensor) -> Tiles:
    """Return the tiles for (batch, heads, queries, head_dim) inputs like `q`."""
    if q.device.type == "cpu":
        return _INTERPRETED
    return choose(_architecture(q.device), q.dtype, head_pad(q.shape[3]))


def choose(architecture: int, dtype: torch.dtype, head_pad: int) -> Tiles:
    """Return the table's tiles for sm_NN."""
    if dtype == torch.float32:
        # For sm_100 Triton 3.6 compiles fp32 products of 64 rows and more to an empty kernel.
        table = _HOPPER_SINGLE if 90 <= architecture < 100 else _PORTABLE_SINGLE
    else:
        # Consumer GPUs of the Blackwell kind (sm_120) have an older kind's shared memory.
        table = _HOPPER_HALF if 90 <= architecture < 120 else _PORTABLE_HALF
    return table[max(min(table), head_pad)]


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
