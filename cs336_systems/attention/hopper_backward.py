"""FlashAttention's backward pass on Hopper in Gluon, five products a tile: one warp fetches, two
warpgroups compute.

An item of work is 128 keys of one key-value head, 64 to a warpgroup; a program does one item after
another and in each goes through all queries that see the keys, of all heads that share them, 64 a
turn. Scores are transposed (keys first), so that P^T and dS^T are left operands straight from
registers; so are K and V where there is room for them, since products with both operands in shared
memory take all that it can deliver. dQ needs the dS of both groups: it goes through shared memory,
and its sums leave by the accelerator's reduce-add in fp32.

A turn, with what the tensor cores do meanwhile in brackets:
  S^T = K Q^T, dP^T = V dO^T
  P^T = exp2(S^T - L)                       [dP^T]
  dS^T = P^T (dP^T - D), published
  dV += P^T dO
  wait for the other group's dS^T           [dV]
  dQ = dS K, dK += dS^T Q
  send dQ off                               [dK]
dV could begin before dS^T, but then one group's dV would be in the way of the other's dP^T, for
which both wait. No product is in flight from one turn to the next: ptxas would then let none be in
flight.

Source: Dao 2023 (FlashAttention-2), algorithm 2; Shah et al. 2024 (FlashAttention-3), appendix.
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

from cs336_systems.attention.hopper_common import (
    NUM_BARRIERS,
    ROWS,
    hand_back,
    in_order,
    item_at,
    meet,
    release,
    sums_layout,
    take_back,
)
from cs336_systems.attention.hopper_gradients import masked, send, times_keys

KEYS = gl.constexpr(128)
Q_BARRIERS = gl.constexpr(2)
"""Named barriers: two at which groups meet, then those of Q's slots and of dO's."""


@gluon.jit
def place(turn, first_row, per_head, GROUP: gl.constexpr):
    """Return which of the heads that share the keys a turn is of, and its first query."""
    member = 0
    step = turn
    if GROUP > 1:
        member = turn // per_head
        step = turn % per_head
    return member, first_row + step * ROWS


@gluon.jit
def first_row_of(key0, num_queries_padded, CAUSAL: gl.constexpr):
    """Return the first query to go through."""
    first_row = 0
    if CAUSAL:  # Of keys that no query sees, the last queries' scores are all masked.
        first_row = gl.minimum(key0, num_queries_padded - 2 * ROWS)
    return first_row


@gluon.jit
def produce(
    GROUP: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    q, k, v, do, lse2, delta, q_slots, do_slots, k_slots, v_slots, l_slots, d_slots,
    kv_full, kv_empty, q_full, do_full,
    items_ptr, num_heads, num_queries_padded,
):  # fmt: skip
    """Fetch K and V, then Q with L and dO with D turn by turn, as slots become free."""
    done, ring = 0, 0  # items and turns
    tile, batch, kv_head, following = item_at(items_ptr, gl.program_id(0))
    while tile >= 0:
        key0 = tile * KEYS
        first_row = first_row_of(key0, num_queries_padded, CAUSAL)
        per_head = (num_queries_padded - first_row) // ROWS
        mbarrier.wait(kv_empty.index(0), done & 1 ^ 1)
        mbarrier.expect(kv_full.index(0), k.block_type.nbytes + 2 * v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k, [batch, kv_head, key0, 0], kv_full.index(0), k_slots.index(0)
        )
        for group in gl.static_range(2):
            tma.async_copy_global_to_shared(
                v, [batch, kv_head, key0 + group * ROWS, 0], kv_full.index(0),
                v_slots.index(group),
            )  # fmt: skip
        for turn in range(GROUP * per_head):
            member, row0 = place(turn, first_row, per_head, GROUP)
            head = kv_head * GROUP + member
            row = (batch * num_heads + head) * num_queries_padded + row0
            at = ring + turn
            q_slot, do_slot = at % Q_STAGES, at % DO_STAGES
            if at >= Q_STAGES:
                take_back(Q_BARRIERS + q_slot, 2)
            mbarrier.expect(q_full.index(q_slot), q.block_type.nbytes + lse2.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q, [batch, head, row0, 0], q_full.index(q_slot), q_slots.index(q_slot)
            )
            tma.async_copy_global_to_shared(
                lse2, [row], q_full.index(q_slot), l_slots.index(q_slot)
            )
            if at >= DO_STAGES:
                take_back(Q_BARRIERS + Q_STAGES + do_slot, 2)
            mbarrier.expect(do_full.index(do_slot), do.block_type.nbytes + delta.block_type.nbytes)
            tma.async_copy_global_to_shared(
                do, [batch, head, row0, 0], do_full.index(do_slot), do_slots.index(do_slot)
            )
            tma.async_copy_global_to_shared(
                delta, [row], do_full.index(do_slot), d_slots.index(do_slot)
            )
        done += 1
        ring += GROUP * per_head
        tile, batch, kv_head, following = item_at(items_ptr, following)


@gluon.jit
def store_rows(target, batch, kv_head, row0, num_rows, stage, rows, dtype: gl.constexpr):
    """Send the rows of a group to `target`, once `stage` is free."""
    tma.store_wait(0)
    gl.thread_barrier()
    stage.reshape([ROWS, rows.shape[1]]).store(rows.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    if row0 < num_rows:
        tma.async_copy_shared_to_global(target, [batch, kv_head, row0, 0], stage)


@gluon.jit
def one_turn(
    dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, K, V, ds_slots, dq_slots,
    q_full, do_full, turn, row, row0, key0, num_keys, qk_scale,
    PARITY: gl.constexpr, WHICH: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    HOLD: gl.constexpr, CAUSAL: gl.constexpr, KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """One turn. row: its first query's row in L, D and the dQ buffer. PARITY of the turn counts
    where groups take turns with dQ. K and V: this group's, if they are held in registers.

    `turn >> 30` is 0, which the compiler cannot know: addresses that it takes for fixed it computes
    before the loop, more than there are registers for.
    """
    dtype: gl.constexpr = q_slots.dtype
    HEAD_DIM: gl.constexpr = q_slots.shape[4]
    S_LAYOUT: gl.constexpr = sums_layout(ROWS)
    HELD: gl.constexpr = gl.DotOperandLayout(0, sums_layout(HEAD_DIM), 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    SPLIT: gl.constexpr = HEAD_DIM == 128  # both groups have half of dQ's columns; or take turns
    MINE: gl.constexpr = SPLIT or PARITY == WHICH
    zeros = gl.zeros((ROWS, ROWS), gl.float32, S_LAYOUT)
    K_all = k_slots.index(0 if HOLD else turn >> 30).reshape([KEYS, HEAD_DIM])
    if not HOLD:
        K = K_all.slice(WHICH * ROWS, ROWS, 0)
        V = v_slots.index(WHICH + (turn >> 30)).reshape([ROWS, HEAD_DIM])
    q_slot, do_slot = turn % Q_STAGES, turn % DO_STAGES
    Q = q_slots.index(q_slot).reshape([ROWS, HEAD_DIM])
    dO = do_slots.index(do_slot).reshape([ROWS, HEAD_DIM])
    dS_all = ds_slots.index(turn & 1)

    mbarrier.wait(q_full.index(q_slot), (turn // Q_STAGES) & 1)
    S = warpgroup_mma(K, Q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # Not behind dP: loads from shared memory and products are in one queue.
    L = l_slots.index(q_slot).load(COLS)
    mbarrier.wait(do_full.index(do_slot), (turn // DO_STAGES) & 1)
    dP = warpgroup_mma(V, dO.permute((1, 0)), zeros, use_acc=False, is_async=True)
    S_now = warpgroup_mma_wait(1, (S,))
    S_now = masked(S_now, row0, key0, num_keys, WHICH, CAUSAL, KEY_TAIL)
    P = gl.exp2(S_now * qk_scale - L[None, :])
    if SPLIT:
        P = in_order(P, ROWS * ROWS // 128)
    P_half = gl.convert_layout(P.to(dtype), HELD)
    D = d_slots.index(do_slot).load(COLS)
    dP_now = warpgroup_mma_wait(0, (dP,))
    dS = (P * (dP_now - D[None, :])).to(dtype)
    dS_all.slice(WHICH * ROWS, ROWS, 0).store(dS)
    dv = warpgroup_mma(P_half, dO, dv, is_async=True)
    fence_async_shared()
    if SPLIT:
        meet(0, True)
    else:
        meet(PARITY, MINE)
    if MINE:
        dQ = times_keys(dS_all, K_all, WHICH, SPLIT)
    dk = warpgroup_mma(gl.convert_layout(dS, HELD), Q, dk, is_async=True)
    if MINE:
        dv, dQ_now = warpgroup_mma_wait(1, (dv, dQ))
    else:
        # Triton wants one between turns; here warps are close together.
        gl.thread_barrier()
        dv = warpgroup_mma_wait(1, (dv,))
    hand_back(Q_BARRIERS + Q_STAGES + do_slot, 2)
    if MINE:
        send(dq, dq_slots.index(WHICH), dQ_now, row, WHICH, SPLIT)
    dk = warpgroup_mma_wait(0, (dk,))
    hand_back(Q_BARRIERS + q_slot, 2)
    return dk, dv


@gluon.jit
def consume(
    WHICH: gl.constexpr, GROUP: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    HOLD: gl.constexpr, CAUSAL: gl.constexpr, KEY_TAIL: gl.constexpr, HEAD_DIM: gl.constexpr,
    dq, dk_desc, dv_desc, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, ds_slots,
    dq_slots, out_slots, kv_full, kv_empty, q_full, do_full,
    items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
):  # fmt: skip
    """Compute dK and dV of 64 keys of every item, and this group's share of dQ."""
    dtype: gl.constexpr = q_slots.dtype
    D_LAYOUT: gl.constexpr = sums_layout(HEAD_DIM)
    KV_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, sums_layout(ROWS), 2)
    STEP: gl.constexpr = 1 if HEAD_DIM == 128 else 2
    K_here = k_slots.index(0).reshape([KEYS, HEAD_DIM]).slice(WHICH * ROWS, ROWS, 0)
    V_here = v_slots.index(WHICH).reshape([ROWS, HEAD_DIM])
    stage = out_slots.index(WHICH)
    done, ring = 0, 0
    item = gl.program_id(0)
    tile, batch, kv_head, _ = item_at(items_ptr, item)
    while tile >= 0:
        key0 = tile * KEYS
        first_row = first_row_of(key0, num_queries_padded, CAUSAL)
        per_head = (num_queries_padded - first_row) // ROWS
        head_row = (batch * num_heads + kv_head * GROUP) * num_queries_padded
        dk = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        dv = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        mbarrier.wait(kv_full.index(0), done & 1)
        K, V = K_here, V_here
        if HOLD:
            K, V = K.load(KV_LAYOUT), V.load(KV_LAYOUT)
        for first in range(0, GROUP * per_head, STEP):  # an even number of turns
            for half in gl.static_range(STEP):
                turn = first + half
                member, row0 = place(turn, first_row, per_head, GROUP)
                row = head_row + member * num_queries_padded + row0
                dk, dv = one_turn(
                    dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, K, V,
                    ds_slots, dq_slots, q_full, do_full, ring + turn, row, row0, key0,
                    num_keys, qk_scale,
                    half, WHICH, Q_STAGES, DO_STAGES, HOLD, CAUSAL, KEY_TAIL,
                )  # fmt: skip
        release(kv_empty.index(0))
        # Looked up again: the loop has no registers for it.
        tile, batch, kv_head, item = item_at(items_ptr, item)
        next_tile, next_batch, next_head, _ = item_at(items_ptr, item)
        key = tile * KEYS + WHICH * ROWS
        store_rows(dv_desc, batch, kv_head, key, num_keys, stage, dv, dtype)
        store_rows(dk_desc, batch, kv_head, key, num_keys, stage, dk * scale, dtype)
        done += 1
        ring += GROUP * per_head
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
    Q_STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr,
    HOLD: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """num_queries_padded is a multiple of 128, to which L (inf) and D (0) are padded."""
    HEAD_DIM: gl.constexpr = k.block_shape[3]
    q_slots = gl.allocate_shared_memory(q.dtype, [Q_STAGES, 1, 1, ROWS, HEAD_DIM], q.layout)
    do_slots = gl.allocate_shared_memory(q.dtype, [DO_STAGES, 1, 1, ROWS, HEAD_DIM], do.layout)
    k_slots = gl.allocate_shared_memory(q.dtype, [1, 1, 1, KEYS, HEAD_DIM], k.layout)
    v_slots = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, HEAD_DIM], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], q.dtype)
    ds_slots = gl.allocate_shared_memory(q.dtype, [2, KEYS, ROWS], DS)
    dq_slots = gl.allocate_shared_memory(gl.float32, [2, 128, 32], dq.layout)
    out_slots = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, HEAD_DIM], dk.layout)
    l_slots = gl.allocate_shared_memory(gl.float32, [Q_STAGES, ROWS], lse2.layout)
    d_slots = gl.allocate_shared_memory(gl.float32, [DO_STAGES, ROWS], delta.layout)
    gl.static_assert(Q_BARRIERS + Q_STAGES + DO_STAGES <= NUM_BARRIERS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=2)
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(stage), count=1)
    for stage in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(stage), count=1)
    fence_async_shared()
    shared = (
        dq, dk, dv, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, ds_slots, dq_slots,
        out_slots, kv_full, kv_empty, q_full, do_full,
        items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
    )  # fmt: skip
    fetched = (
        q, k, v, do, lse2, delta, q_slots, do_slots, k_slots, v_slots, l_slots, d_slots,
        kv_full, kv_empty, q_full, do_full,
        items_ptr, num_heads, num_queries_padded,
    )  # fmt: skip
    # Constants stay such only outside of variables. Gluon has no unpacking.
    gl.warp_specialize(
        [
            (consume, (0, GROUP, Q_STAGES, DO_STAGES, HOLD, CAUSAL, KEY_TAIL, HEAD_DIM) + shared),
            (consume, (1, GROUP, Q_STAGES, DO_STAGES, HOLD, CAUSAL, KEY_TAIL, HEAD_DIM) + shared),
            (produce, (GROUP, Q_STAGES, DO_STAGES, CAUSAL) + fetched),
        ],
        [4, 1],
        [240, 24],
    )
