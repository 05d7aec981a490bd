"""What the Triton attention kernels share: where a program works, and how a tile is read.

Tensors are (batch, heads, rows, head dim). A tile is (ROWS, HEAD_PAD): HEAD_PAD is the next power
of two, and what lies outside the tensor reads as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(pid, num_tiles, num_batch_heads, section):
    """Return the (tile, batch and head) of a program: tile by tile within sections of heads.

    The heads of one section are worked on together, so that what they read again stays in L2.
    """
    first = pid // (num_tiles * section) * section
    num_heads = tl.minimum(section, num_batch_heads - first)
    rest = pid - first * num_tiles
    return rest // num_heads, first + rest % num_heads


@triton.jit
def head_of(source, stride_batch, stride_head, batch, head, TMA: tl.constexpr):
    """Return where one head's rows begin; a descriptor finds its head when it loads."""
    if TMA:
        rows = source
    else:
        rows = source + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    return rows


@triton.jit
def tile_pointers(
    base,
    stride_row,
    row0,
    ROWS: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the addresses of a tile; WIDE where even offsets inside a tile pass 2^31."""
    rows = tl.arange(0, ROWS)
    if WIDE:
        rows = rows.to(tl.int64)
    start = base + tl.cast(row0, tl.int64) * stride_row
    return start + rows[:, None] * stride_row + tl.arange(0, HEAD_PAD)[None, :]


@triton.jit
def tile_inside(row0, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Return which elements of a tile exist."""
    rows = row0 + tl.arange(0, ROWS)
    return (rows < num_rows)[:, None] & (tl.arange(0, HEAD_PAD) < HEAD_DIM)[None, :]


@triton.jit
def load_tile(
    source,
    stride_row,
    batch,
    head,
    row0,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Read ROWS rows from row0 on; CHECK_ROWS where some may lie past the last."""
    if TMA:
        tile = source.load([batch, head, row0, 0]).reshape(ROWS, HEAD_PAD)
    else:
        pointers = tile_pointers(source, stride_row, row0, ROWS, HEAD_PAD, WIDE)
        if CHECK_ROWS:
            inside = tile_inside(row0, num_rows, ROWS, HEAD_DIM, HEAD_PAD)
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif HEAD_DIM != HEAD_PAD:
            inside = (tl.arange(0, HEAD_PAD) < HEAD_DIM)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def hold(tile, ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Return the tile in registers, as a product's left operand, and not in shared memory.

    Adding a product of zeros makes the compiler choose the layout. It costs registers, and takes
    two of five reads of shared memory from a product whose right operand has 64 columns.
    """
    zeros = tl.dot(tl.zeros((ROWS, 16), tile.dtype), tl.zeros((16, HEAD_PAD), tile.dtype))
    return tile + zeros.to(tile.dtype)


@triton.jit
def load_statistic(pointers, DIRECT: tl.constexpr):
    """Read fp32 numbers, one a row.

    DIRECT: not through the loop's pipeline, whose buffers would be what keeps a second program off
    the multiprocessor.
    """
    if DIRECT:
        numbers = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        numbers = tl.load(pointers)
    return numbers


@triton.jit
def store_tile(
    base,
    stride_row,
    row0,
    num_rows,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the rows and columns of a tile that exist, in the tensor's dtype."""
    pointers = tile_pointers(base, stride_row, row0, ROWS, HEAD_PAD, WIDE)
    inside = tile_inside(row0, num_rows, ROWS, HEAD_DIM, HEAD_PAD)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)
