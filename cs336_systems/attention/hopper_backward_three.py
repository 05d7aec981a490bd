"""FlashAttention's backward pass on Hopper for head dim 64 with three warpgroups that compute.

As `hopper_backward`, but an item of work is 192 keys, and 168 registers a thread are left. All
three groups go through the same turns of 64 queries; dQ of a turn, which needs the dS of all, is
computed and sent by one of them, each in one of three turns. The others only say that their dS is
there and go on, so that one group's products run beside another's exponentials.

A group that is ahead may write dS of a turn while a slower one still multiplies that of an earlier
one: two turns before, but not three, since in between it has been the one who waits for all others.
So there are three buffers of dS. The one that a turn after the last would have is where a group
puts dV and dK on their way out.

A turn of a group, with what the tensor cores do meanwhile in brackets:
  S^T = K Q^T
  dP^T - D = V dO^T - D
  P^T = exp2(S^T - L)                       [dP^T]
  dS^T = P^T (dP^T - D), published
  dV += P^T dO, dK += dS^T Q
  if it is this group's, wait for the others' dS^T, dQ = dS K, send it off

V is held in registers and K is not: there is room for one of them. D goes into the sums of dP
before its product, for which V is negated; else its reads from shared memory would be the last
thing a turn waits for. In the source P comes before dP is asked for, since the other order makes
ptxas serialize all products; it puts most exponentials behind dP by itself.
"""

# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cs336_systems.attention.hopper_backward import ALL, extent, fetch, store_rows
from cs336_systems.attention.hopper_common import (
    ROWS,
    come_to_meet,
    item_after,
    item_at,
    load_columns,
    meet,
    prefetch_item,
    sums_layout,
)
from cs336_systems.attention.hopper_gradients import masked, send

GROUPS = gl.constexpr(3)
KEYS = gl.constexpr(192)
HEAD_DIM = gl.constexpr(64)
ITEMS = gl.constexpr(3)
"""Named barriers: one for each group to meet the others at, then that at which group 0 learns that
all are done with an item."""


@gluon.jit
def fetch_item(
    q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, kv_full, full,
    ring, tile, batch, kv_head, num_heads, num_queries_padded,
    GROUP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Ask for an item's K and V, and for its first turns, up to those that `one_turn` asks for."""
    key0 = tile * KEYS
    first_row, per_head, head_row = extent(
        key0, batch, kv_head, num_heads, num_queries_padded, ROWS, GROUP, CAUSAL
    )
    mbarrier.expect(kv_full.index(0), GROUPS * (k.block_type.nbytes + v.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        box = [batch, kv_head, key0 + group * ROWS, 0]
        tma.async_copy_global_to_shared(k, box, kv_full.index(0), k_slots.index(group))
        tma.async_copy_global_to_shared(v, box, kv_full.index(0), v_slots.index(group))
    for turn in gl.static_range(STAGES - 1):
        fetch(
            q, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, full, ring + turn, turn,
            GROUP * per_head, batch, kv_head * GROUP, first_row, per_head, head_row,
            num_queries_padded, ALL, GROUP, STAGES,
        )  # fmt: skip


@gluon.jit
def times_keys(ds_slots, k_slots, ds_slot, nothing):
    """Begin dQ = dS K, 64 keys at a time. `nothing` is 0: see `one_turn`."""
    dQ = gl.zeros((ROWS, HEAD_DIM), gl.float32, sums_layout(HEAD_DIM))
    for group in gl.static_range(GROUPS):
        dS = ds_slots.index(ds_slot + group).reshape([ROWS, ROWS])
        K = k_slots.index(group + nothing).reshape([ROWS, HEAD_DIM])
        dQ = warpgroup_mma(dS.permute((1, 0)), K, dQ, use_acc=group > 0, is_async=True)
    return dQ


@gluon.jit
def one_turn(
    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, minus_V, ds_slots,
    dq_slots, full, ring, turn, num_turns, batch, first_head, first_row, per_head, head_row,
    num_queries_padded, row, row0, key0, num_keys, qk_scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """One turn. row: its first query's row in L, D and the dQ buffer.

    `at >> 30` is 0, which the compiler cannot know: addresses that it takes for fixed it computes
    before the loop, more than there are registers for.
    """
    dtype: gl.constexpr = q_slots.dtype
    S_LAYOUT: gl.constexpr = sums_layout(ROWS)
    HELD: gl.constexpr = gl.DotOperandLayout(0, sums_layout(HEAD_DIM), 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    zeros = gl.zeros((ROWS, ROWS), gl.float32, S_LAYOUT)
    at = ring + turn
    K = k_slots.index(WHICH + (at >> 30)).reshape([ROWS, HEAD_DIM])
    slot, owner = at % STAGES, at % GROUPS
    Q = q_slots.index(slot).reshape([ROWS, HEAD_DIM])
    dO = do_slots.index(slot).reshape([ROWS, HEAD_DIM])

    mbarrier.wait(full.index(slot), (at // STAGES) & 1)
    # Before S: loads from shared memory and products are in one queue.
    L = load_columns(l_slots.index(slot), COLS)
    S = warpgroup_mma(K, Q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    S_now = warpgroup_mma_wait(0, (S,))
    S_now = masked(S_now, row0, key0, num_keys, WHICH, MASKED, KEY_TAIL)
    D = load_columns(d_slots.index(slot), COLS)
    P = gl.exp2(S_now * qk_scale - L[None, :])
    rest = warpgroup_mma(minus_V, dO.permute((1, 0)), D[None, :] * (zeros + 1.0), is_async=True)
    rest_now = warpgroup_mma_wait(0, (rest,))  # D - dP
    dS = (P * -1.0 * rest_now).to(dtype)
    P_half = gl.convert_layout(P.to(dtype), HELD)
    ds_slot = owner * GROUPS
    ds_slots.index(ds_slot + WHICH).reshape([ROWS, ROWS]).store(dS)
    dV = warpgroup_mma(P_half, dO, dv, is_async=True)
    fence_async_shared()
    if owner != WHICH:
        come_to_meet(owner, GROUPS)
    dK = warpgroup_mma(gl.convert_layout(dS, HELD), Q, dk, is_async=True)
    dv, dk = warpgroup_mma_wait(0, (dV, dK))
    if owner == WHICH:
        meet(WHICH, True, GROUPS)
        dQ = times_keys(ds_slots, k_slots, ds_slot, at >> 30)
        # All are done with the turn before: its slot is that of the turn after the next.
        fetch(
            q, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, full, at + STAGES - 1,
            turn + STAGES - 1, num_turns, batch, first_head, first_row, per_head, head_row,
            num_queries_padded, ALL, GROUP, STAGES,
        )  # fmt: skip
        dQ_now = warpgroup_mma_wait(0, (dQ,))
        send(dq, dq_slots.index(WHICH), dQ_now, row, 0, False)
    else:
        # Triton wants one between turns; here warps are close together.
        gl.thread_barrier()
    return dk, dv


@gluon.jit
def go_through(
    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, minus_V, ds_slots,
    dq_slots, full, ring, before, begin, end, num_turns, batch, first_head, first_row, per_head,
    head_row, num_queries_padded, row, key0, num_keys, qk_scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """As `hopper_backward.go_through`, of any number of turns."""
    for step in range(begin, end):
        row0 = first_row + step * ROWS
        dk, dv = one_turn(
            q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, minus_V,
            ds_slots, dq_slots, full, ring, before + step, num_turns, batch, first_head, first_row,
            per_head, head_row, num_queries_padded, row + row0, row0, key0, num_keys, qk_scale,
            WHICH, GROUP, STAGES, MASKED, KEY_TAIL,
        )  # fmt: skip
    return dk, dv


@gluon.jit
def compute(
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr,
    q, k, v, do, lse2, delta, dq, dk_desc, dv_desc, q_slots, do_slots, l_slots, d_slots, k_slots,
    v_slots, ds_slots, dq_slots, kv_full, full,
    items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
):  # fmt: skip
    """Compute dK and dV of 64 keys of every item, and dQ of every third turn."""
    dtype: gl.constexpr = q_slots.dtype
    D_LAYOUT: gl.constexpr = sums_layout(HEAD_DIM)
    KV_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, sums_layout(ROWS), 2)
    V_here = v_slots.index(WHICH).reshape([ROWS, HEAD_DIM])
    done, ring = 0, 0
    item = gl.program_id(0)
    tile, batch, kv_head, _ = item_at(items_ptr, item)
    if WHICH == 0:
        fetch_item(
            q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots,
            kv_full, full, ring, tile, batch, kv_head, num_heads, num_queries_padded,
            GROUP, STAGES, CAUSAL,
        )  # fmt: skip
    while tile >= 0:
        prefetch_item(items_ptr, item)
        key0 = tile * KEYS
        first_row, per_head, head_row = extent(
            key0, batch, kv_head, num_heads, num_queries_padded, ROWS, GROUP, CAUSAL
        )
        num_turns, first_head = GROUP * per_head, kv_head * GROUP
        dk = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        dv = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        mbarrier.wait(kv_full.index(0), done & 1)
        tma.store_wait(0)  # dK of the item before: it was where dS will be
        gl.thread_barrier()
        minus_V = -V_here.load(KV_LAYOUT)
        for member in range(GROUP):
            before, row = member * per_head, head_row + member * num_queries_padded
            begin = 0
            if CAUSAL:
                begin = gl.minimum(GROUPS, per_head)
                dk, dv = go_through(
                    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots,
                    minus_V, ds_slots, dq_slots, full, ring, before, 0, begin, num_turns, batch,
                    first_head, first_row, per_head, head_row, num_queries_padded, row, key0,
                    num_keys, qk_scale,
                    WHICH, GROUP, STAGES, True, KEY_TAIL,
                )  # fmt: skip
            dk, dv = go_through(
                q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots,
                minus_V, ds_slots, dq_slots, full, ring, before, begin, per_head, num_turns, batch,
                first_head, first_row, per_head, head_row, num_queries_padded, row, key0, num_keys,
                qk_scale,
                WHICH, GROUP, STAGES, False, KEY_TAIL,
            )  # fmt: skip
        # Looked up again: the loop has no registers for it.
        next_tile, next_batch, next_head = item_after(items_ptr, item)
        tile, batch, kv_head, item = item_at(items_ptr, item)
        meet(ITEMS, WHICH == 0, GROUPS)
        if WHICH == 0:  # noqa: SIM102 (known when compiled)
            if next_tile >= 0:
                fetch_item(
                    q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots,
                    v_slots, kv_full, full, ring + num_turns, next_tile, next_batch, next_head,
                    num_heads, num_queries_padded, GROUP, STAGES, CAUSAL,
                )  # fmt: skip
        key = tile * KEYS + WHICH * ROWS
        stage = ds_slots.index((ring + num_turns) % GROUPS * GROUPS + WHICH)
        store_rows(dv_desc, batch, kv_head, key, num_keys, stage, dv, dtype)
        store_rows(dk_desc, batch, kv_head, key, num_keys, stage, dk * scale, dtype)
        done += 1
        ring += num_turns
        tile, batch, kv_head = next_tile, next_batch, next_head
    tma.store_wait(0)


@gluon.jit
def backward_kernel(
    q, k, v, do, lse2, delta, dq, dk, dv,
    items_ptr,
    num_heads,
    num_queries_padded,
    num_keys,
    qk_scale,
    scale,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """num_queries_padded is a multiple of 64, to which L (inf) and D (0) are padded."""
    gl.static_assert(k.block_shape[3] == HEAD_DIM)
    q_slots = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, ROWS, HEAD_DIM], q.layout)
    do_slots = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, ROWS, HEAD_DIM], do.layout)
    k_slots = gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, HEAD_DIM], k.layout)
    v_slots = gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, HEAD_DIM], v.layout)
    # Three buffers of 64 x 64 for each group.
    ds_slots = gl.allocate_shared_memory(q.dtype, [GROUPS * GROUPS, 1, 1, ROWS, ROWS], dk.layout)
    dq_slots = gl.allocate_shared_memory(gl.float32, [GROUPS, 128, 32], dq.layout)
    l_slots = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse2.layout)
    d_slots = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    shared = (
        q, k, v, do, lse2, delta, dq, dk, dv, q_slots, do_slots, l_slots, d_slots, k_slots,
        v_slots, ds_slots, dq_slots, kv_full, full,
        items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
    )  # fmt: skip
    # Constants stay such only outside of variables. Gluon has no unpacking.
    gl.warp_specialize(
        [
            (compute, (0, GROUP, STAGES, CAUSAL, KEY_TAIL) + shared),
            (compute, (1, GROUP, STAGES, CAUSAL, KEY_TAIL) + shared),
            (compute, (2, GROUP, STAGES, CAUSAL, KEY_TAIL) + shared),
        ],
        [4, 4],
        [168, 168],
    )
