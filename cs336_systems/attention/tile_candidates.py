"""Which tiles are worth measuring against the table's."""

from __future__ import annotations

from dataclasses import replace

import torch

from cs336_systems.attention.tiles import ROWS_MULTIPLE, Tile

# (block_m, block_n, num_warps, num_stages). Few, since each is compiled.
_HALF = {
    "forward": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    ),
    # Triton 3.6 makes the one-pass kernel access illegal memory with one stage, or with fp32
    # products split in three: no tile here has one stage, and fp32 tries none but the table's.
    "one_pass": (
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 64, 8, 2), (64, 128, 8, 2), (128, 128, 8, 2),
    ),
    "keys": (
        (16, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2),
        (64, 64, 8, 2), (64, 128, 8, 2),
    ),
    "queries": (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2),
        (128, 64, 8, 2), (128, 64, 8, 3),
    ),
}  # fmt: skip
_SINGLE = {
    "forward": ((32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
    "one_pass": (),
    "keys": ((16, 32, 4, 2), (16, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2)),
    "queries": ((32, 32, 4, 2), (64, 16, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
}
# At head dim 256, compiled for sm_90, these of the fp32 backward need more shared memory than there
# is or spill 11 KiB a thread, and take up to half a minute each to compile.
_WIDEST_SINGLE = 128


def candidates(kernel: str, table: Tile, *, dtype: torch.dtype, pad: int, tma: bool) -> list[Tile]:
    """Return the tiles to try, the table's own first."""
    single = dtype == torch.float32
    shapes = (_SINGLE if single else _HALF)[kernel]
    tiles = [table]
    for m, n, warps, stages in () if single and pad > _WIDEST_SINGLE else shapes:
        assert ROWS_MULTIPLE % m == 0
        # Where the accelerator cannot load, two tiles that differ by it are the same.
        for accelerated in (True, False) if tma else (table.tma,):
            tile = Tile(block_m=m, block_n=n, num_warps=warps, num_stages=stages, tma=accelerated)
            if tile != replace(table, spilled_bytes=0):
                tiles.append(tile)
    return tiles
