"""What the Hopper kernels share: where a program works, barriers by name, and giving back slots.

Barriers: a slot's `full` is signalled by the accelerator's bytes; in its n-th use a reader waits
for parity n & 1 of it. Where a warp of its own fetches, as in the forward pass, a slot's `empty` is
signalled by every warpgroup that reads it, and that warp waits for the opposite parity.

Slots that come back turn by turn have a named barrier for an `empty`. There every thread arrives
for itself and goes on; to arrive at one in memory, one thread for its group, the group's warps must
meet before.
"""

from __future__ import annotations

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ROWS = gl.constexpr(64)
"""Rows of one product of a warpgroup."""
_FIRST_BARRIER = gl.constexpr(8)
"""Ids below are Triton's own."""
NUM_BARRIERS = gl.constexpr(8)
"""Named barriers that kernels have: 0 to 7 here, the hardware's 8 to 15."""


@constexpr_function
def sums_layout(columns):
    """Return how the sums of 64 rows of a product lie in a warpgroup's registers."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@constexpr_function
def _held_layout():
    """Return how threads hold what `load_columns` loads, as [4, 4, 2, 2]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [2, 0, 0, 0]],
        lane_bases=[[0, 1, 0, 0], [0, 2, 0, 0]] + [[0, 0, 0, 0]] * 3,
        warp_bases=[[0, 0, 0, 0]] * 2,
        block_bases=[],
        shape=[4, 4, 2, 2],
    )


@gluon.jit
def load_columns(numbers, LAYOUT: gl.constexpr):
    """Load a number for each of a product's 64 columns, 16 bytes at a time.

    A thread has two columns of every eight, side by side, and those of four pairs of eights. In
    shared memory the bits of a column, (pair 2, eight 1, lane 2, element 1), are therefore in the
    order (pair, lane, eight, element).
    """
    held = numbers.reshape([4, 4, 2, 2]).load(_held_layout())
    return gl.convert_layout(
        held.permute((0, 2, 1, 3)).reshape([ROWS]), LAYOUT, assert_trivial=True
    )


@gluon.jit
def item_at(items_ptr, row):
    """Return (tile, batch, head, the row that follows) of a row of `hopper_schedule.schedule`."""
    at = items_ptr + row * 8
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def item_after(items_ptr, row):
    """Return (tile, batch, head) of the row that follows."""
    at = items_ptr + row * 8 + 4
    return gl.load(at), gl.load(at + 1), gl.load(at + 2)


@gluon.jit
def prefetch_item(items_ptr, row):
    """Have a row brought close, to be read without a wait for memory."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [items_ptr + row * 8], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def release(empty):
    """Say that all warps of this group are done with a slot."""
    gl.thread_barrier()
    mbarrier.arrive(empty)


@constexpr_function
def _barrier_text(wait, which, num_threads):
    return f"bar.{'sync' if wait else 'arrive'} {which}, {num_threads}; mov.u32 $0, 0;"


@gluon.jit
def meet(WHICH: gl.constexpr, WAIT: gl.constexpr, GROUPS: gl.constexpr = 2):
    """Have warpgroups meet at barrier WHICH; only who waits stays until all have come."""
    BARRIER: gl.constexpr = _FIRST_BARRIER + WHICH
    gl.inline_asm_elementwise(
        _barrier_text(WAIT, BARRIER, 128 * GROUPS), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def come_to_meet(which, GROUPS: gl.constexpr):
    """As `meet` without waiting, where the barrier is known only at run time."""
    _come(which, False, 128 * GROUPS)


@gluon.jit
def _come(which, WAIT: gl.constexpr, NUM_THREADS: gl.constexpr):
    """Come to a barrier where so many threads are expected."""
    gl.inline_asm_elementwise(
        _barrier_text(WAIT, "$1", NUM_THREADS), "=r,r", [_FIRST_BARRIER + which],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def hand_back(which, READERS: gl.constexpr):
    """Say that this thread is done with a slot, at its barrier; all of READERS warpgroups do."""
    _come(which, False, 128 * READERS + 32)


@gluon.jit
def take_back(which, READERS: gl.constexpr):
    """Wait, as the fetching warp, until READERS warpgroups are done with a slot."""
    _come(which, True, 128 * READERS + 32)
