"""What a turn of the backward kernels does apart from its order: the mask, dQ, and dQ's way out."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)

from cs336_systems.attention.hopper_common import ROWS, sums_layout


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory, asynchronously."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)


@gluon.jit
def masked(
    S_now, row0, key0, num_keys, WHICH: gl.constexpr, MASKED: gl.constexpr, KEY_TAIL: gl.constexpr
):
    """Return the scores of a group's keys and a turn's queries, the first of which is row0, with
    -inf for keys past the last one, and if MASKED for keys behind their queries."""
    S_LAYOUT: gl.constexpr = sums_layout(ROWS)
    keys = key0 + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    if MASKED:
        rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(0, S_LAYOUT))
        S_now = gl.where(keys[:, None] <= rows[None, :], S_now, float("-inf"))
    if KEY_TAIL:
        S_now = gl.where((keys < num_keys)[:, None], S_now, float("-inf"))
    return S_now


@gluon.jit
def times_keys(dS, K_all, WHICH: gl.constexpr, SPLIT: gl.constexpr):
    """Begin dQ = dS K: this group's half of the columns, or all of them."""
    K = K_all.slice(WHICH * 64, 64, 1) if SPLIT else K_all
    zeros = gl.zeros((ROWS, 64), gl.float32, sums_layout(64))
    return warpgroup_mma(dS.permute((1, 0)), K, zeros, use_acc=False, is_async=True)


@gluon.jit
def send(dq, dq_slot, dQ, row, WHICH: gl.constexpr, SPLIT: gl.constexpr):
    """Add 64 x 64 of dQ to the buffer, in fragment order (see `plan_hopper_backward`).

    Each thread then stores 16 bytes at a time, no two threads in one bank.
    """
    fragments = dQ.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    tma.store_wait(0)  # what the slot had before
    gl.thread_barrier()
    dq_slot.store(fragments.reshape([128, 32]))
    fence_async_shared()
    gl.thread_barrier()
    at = row * 4 + WHICH * 128 if SPLIT else row * 2
    reduce_add(dq, [at, 0], dq_slot)
