"""FlashAttention's backward pass on Hopper in Gluon, five products a tile: two warpgroups compute,
and fetch for themselves.

An item of work is 128 keys of one key-value head, 64 to a warpgroup; a program does one item after
another and in each goes through all queries that see the keys, of all heads that share them, 64 a
turn. Scores are transposed (keys first), so that P^T and dS^T are left operands straight from
registers; so are K and V where there is room for them, since products with both operands in shared
memory take all that it can deliver, and that is what bounds this kernel at head dim 128. dQ needs
the dS of both groups: it goes through shared memory, and its sums leave by the accelerator's
reduce-add in fp32.

There is no warp that fetches: it would cost 15 registers of each thread that computes, and where
groups meet for dS, both are done with the turn before, whose slots can be filled again. Group 0
asks for Q and L, group 1 for dO and D. At head dim 128 each has half of dQ's columns, so they meet
in every turn, and there are two slots. At 64 they take turns with all of dQ; only who computes it
waits, and knows then that two slots of four are free.

A turn at head dim 64, with what the tensor cores do meanwhile in brackets:
  S^T = K Q^T, dP^T = V dO^T
  P^T = exp2(S^T - L)                       [dP^T]
  dS^T = P^T (dP^T - D), published
  dV += P^T dO
  wait for the other group's dS^T           [dV]
  dQ = dS K, dK += dS^T Q
  send dQ off                               [dK]
At 128 there is no room for the sums of dV and dQ while P^T is held: dQ begins when dV is done. The
other group's products run meanwhile.

dV could begin before dS^T, but then one group's dV would be in the way of the other's dP^T, for
which both wait. No product is in flight from one turn to the next: ptxas would then let none be in
flight. Of scores, only those of the first two turns of each head may be masked; they are a loop of
their own, since a branch costs registers.

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
    ROWS,
    item_after,
    item_at,
    load_columns,
    meet,
    prefetch_item,
    sums_layout,
)
from cs336_systems.attention.hopper_gradients import masked, send, times_keys

KEYS = gl.constexpr(128)
ITEMS = gl.constexpr(2)
"""The named barrier at which groups learn that both are done with an item; dS has 0 and 1."""
ALL = gl.constexpr(2)
"""What a turn needs, of which groups 0 and 1 otherwise ask for a share each."""
LEAST = gl.constexpr(128)
"""Queries that every item goes through, an even number of turns."""


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
def extent(
    key0, batch, kv_head, num_heads, num_queries_padded,
    LEAST: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Return an item's first query of each head, how many turns a head has, and the first head's
    row in L, D and the dQ buffer. LEAST: how many queries an item goes through at least."""
    first_row = 0
    if CAUSAL:  # Of keys that no query sees, the last queries' scores are all masked.
        first_row = gl.minimum(key0, num_queries_padded - LEAST)
    per_head = (num_queries_padded - first_row) // ROWS
    return first_row, per_head, (batch * num_heads + kv_head * GROUP) * num_queries_padded


@gluon.jit
def fetch(
    q, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, full, at, turn, num_turns, batch,
    first_head, first_row, per_head, head_row, num_queries_padded,
    SHARE: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for Q and L of a turn, if the item has it (SHARE 0), for dO and D (1), or for ALL.

    at: the turn's place in the ring.
    """
    wanted = turn < num_turns
    member, row0 = place(turn, first_row, per_head, GROUP)
    head, row = first_head + member, head_row + member * num_queries_padded + row0
    slot = at % STAGES
    here = full.index(slot)
    Q_BYTES: gl.constexpr = q.block_type.nbytes + lse2.block_type.nbytes if SHARE != 1 else 0
    DO_BYTES: gl.constexpr = do.block_type.nbytes + delta.block_type.nbytes if SHARE != 0 else 0
    mbarrier.expect(here, Q_BYTES + DO_BYTES, pred=wanted)
    if SHARE != 1:
        tma.async_copy_global_to_shared(
            q, [batch, head, row0, 0], here, q_slots.index(slot), pred=wanted
        )
        tma.async_copy_global_to_shared(lse2, [row], here, l_slots.index(slot), pred=wanted)
    if SHARE != 0:
        tma.async_copy_global_to_shared(
            do, [batch, head, row0, 0], here, do_slots.index(slot), pred=wanted
        )
        tma.async_copy_global_to_shared(delta, [row], here, d_slots.index(slot), pred=wanted)


@gluon.jit
def fetch_item(
    q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, kv_full, full,
    ring, tile, batch, kv_head, num_heads, num_queries_padded,
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Ask for an item's K (group 0) or V, and for this group's share of as many turns as `one_turn`
    leaves out: of those before the first where it asks for more."""
    key0 = tile * KEYS
    first_row, per_head, head_row = extent(
        key0, batch, kv_head, num_heads, num_queries_padded, LEAST, GROUP, CAUSAL
    )
    mbarrier.expect(kv_full.index(0), k.block_type.nbytes)
    if WHICH == 0:
        tma.async_copy_global_to_shared(
            k, [batch, kv_head, key0, 0], kv_full.index(0), k_slots.index(0)
        )
    else:
        for group in gl.static_range(2):
            tma.async_copy_global_to_shared(
                v, [batch, kv_head, key0 + group * ROWS, 0], kv_full.index(0), v_slots.index(group)
            )
    FIRST: gl.constexpr = WHICH if STAGES == 4 else 0
    for turn in gl.static_range(FIRST + STAGES // 2):
        fetch(
            q, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, full, ring + turn, turn,
            GROUP * per_head, batch, kv_head * GROUP, first_row, per_head, head_row,
            num_queries_padded, WHICH, GROUP, STAGES,
        )  # fmt: skip


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
    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, K, V,
    ds_slots, dq_slots, full, ring, turn, num_turns, batch, first_head, first_row, per_head,
    head_row, num_queries_padded, row, row0, key0, num_keys, qk_scale,
    PARITY: gl.constexpr, WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    HOLD_K: gl.constexpr, HOLD_V: gl.constexpr, MASKED: gl.constexpr, KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """One turn of an item's. row: its first query's row in L, D and the dQ buffer. PARITY of the
    turn counts where groups take turns with dQ. K and V: this group's, if they are held in
    registers. MASKED: whether keys behind their queries are to be masked.

    `at >> 30` is 0, which the compiler cannot know: addresses that it takes for fixed it computes
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
    at = ring + turn
    K_all = k_slots.index(0 if HOLD_K else at >> 30).reshape([KEYS, HEAD_DIM])
    if not HOLD_K:
        K = K_all.slice(WHICH * ROWS, ROWS, 0)
    if not HOLD_V:
        V = v_slots.index(WHICH + (at >> 30)).reshape([ROWS, HEAD_DIM])
    slot = at % STAGES
    Q = q_slots.index(slot).reshape([ROWS, HEAD_DIM])
    dO = do_slots.index(slot).reshape([ROWS, HEAD_DIM])
    dS_all = ds_slots.index(at & 1)

    mbarrier.wait(full.index(slot), (at // STAGES) & 1)
    S = warpgroup_mma(K, Q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # Not behind dP: loads from shared memory and products are in one queue.
    L = load_columns(l_slots.index(slot), COLS)
    dP = warpgroup_mma(V, dO.permute((1, 0)), zeros, use_acc=False, is_async=True)
    S_now = warpgroup_mma_wait(1, (S,))
    S_now = masked(S_now, row0, key0, num_keys, WHICH, MASKED, KEY_TAIL)
    P = gl.exp2(S_now * qk_scale - L[None, :])
    P_half = gl.convert_layout(P.to(dtype), HELD)
    D = load_columns(d_slots.index(slot), COLS)
    dP_now = warpgroup_mma_wait(0, (dP,))
    dS = (P * (dP_now - D[None, :])).to(dtype)
    dS_all.slice(WHICH * ROWS, ROWS, 0).store(dS)
    dv = warpgroup_mma(P_half, dO, dv, is_async=True)
    fence_async_shared()
    meet(0 if SPLIT else PARITY, MINE)
    if MINE:
        # Both groups are done with the turn before, and at head dim 64 with the one before that.
        for more in gl.static_range(STAGES // 2):
            fetch(
                q, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, full,
                at + STAGES // 2 + more, turn + STAGES // 2 + more, num_turns, batch, first_head,
                first_row, per_head, head_row, num_queries_padded, WHICH, GROUP,
                STAGES,
            )  # fmt: skip
    if SPLIT:
        dv = warpgroup_mma_wait(0, (dv,))
    if MINE:
        dQ = times_keys(dS_all, K_all, WHICH, SPLIT)
    dk = warpgroup_mma(gl.convert_layout(dS, HELD), Q, dk, is_async=True)
    if not SPLIT:
        if not MINE:
            # Triton wants one between turns; here warps are close together.
            gl.thread_barrier()
        dv = warpgroup_mma_wait(2 if MINE else 1, (dv,))
    if MINE:
        dQ_now = warpgroup_mma_wait(1, (dQ,))
        send(dq, dq_slots.index(WHICH), dQ_now, row, WHICH, SPLIT)
    dk = warpgroup_mma_wait(0, (dk,))
    return dk, dv


@gluon.jit
def go_through(
    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, K, V,
    ds_slots, dq_slots, full, ring, before, begin, end, num_turns, batch, first_head, first_row,
    per_head, head_row, num_queries_padded, row, key0, num_keys, qk_scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, HOLD_K: gl.constexpr,
    HOLD_V: gl.constexpr, MASKED: gl.constexpr, KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """An even number of turns of one head. before: how many of other heads came earlier. row: the
    head's first in L, D and the dQ buffer."""
    STEP: gl.constexpr = STAGES // 2
    for first in range(begin, end, STEP):
        for half in gl.static_range(STEP):
            row0 = first_row + (first + half) * ROWS
            dk, dv = one_turn(
                q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots,
                v_slots, K, V, ds_slots, dq_slots, full, ring, before + first + half, num_turns,
                batch, first_head, first_row, per_head, head_row, num_queries_padded, row + row0,
                row0, key0, num_keys, qk_scale,
                half, WHICH, GROUP, STAGES, HOLD_K, HOLD_V, MASKED, KEY_TAIL,
            )  # fmt: skip
    return dk, dv


@gluon.jit
def compute(
    WHICH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    HOLD_K: gl.constexpr, HOLD_V: gl.constexpr, CAUSAL: gl.constexpr, KEY_TAIL: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    q, k, v, do, lse2, delta, dq, dk_desc, dv_desc, q_slots, do_slots, l_slots, d_slots, k_slots,
    v_slots, ds_slots, dq_slots, out_slots, kv_full, full,
    items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
):  # fmt: skip
    """Compute dK and dV of 64 keys of every item, and this group's share of dQ."""
    dtype: gl.constexpr = q_slots.dtype
    D_LAYOUT: gl.constexpr = sums_layout(HEAD_DIM)
    KV_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, sums_layout(ROWS), 2)
    K_here = k_slots.index(0).reshape([KEYS, HEAD_DIM]).slice(WHICH * ROWS, ROWS, 0)
    V_here = v_slots.index(WHICH).reshape([ROWS, HEAD_DIM])
    stage = out_slots.index(WHICH)
    done, ring = 0, 0  # items and turns
    item = gl.program_id(0)
    tile, batch, kv_head, _ = item_at(items_ptr, item)
    fetch_item(
        q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, kv_full,
        full, ring, tile, batch, kv_head, num_heads, num_queries_padded,
        WHICH, GROUP, STAGES, CAUSAL,
    )  # fmt: skip
    while tile >= 0:
        prefetch_item(items_ptr, item)
        key0 = tile * KEYS
        first_row, per_head, head_row = extent(
            key0, batch, kv_head, num_heads, num_queries_padded, LEAST, GROUP, CAUSAL
        )
        num_turns, first_head = GROUP * per_head, kv_head * GROUP
        dk = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        dv = gl.zeros((ROWS, HEAD_DIM), gl.float32, D_LAYOUT)
        mbarrier.wait(kv_full.index(0), done & 1)
        K, V = K_here, V_here
        if HOLD_K:
            K = K.load(KV_LAYOUT)
        if HOLD_V:
            V = V.load(KV_LAYOUT)
        for member in range(GROUP):
            before, row = member * per_head, head_row + member * num_queries_padded
            begin = 0
            if CAUSAL:
                begin = 2
                dk, dv = go_through(
                    q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots,
                    v_slots, K, V, ds_slots, dq_slots, full, ring, before, 0, begin, num_turns,
                    batch, first_head, first_row, per_head, head_row, num_queries_padded, row, key0,
                    num_keys, qk_scale,
                    WHICH, GROUP, STAGES, HOLD_K, HOLD_V, True, KEY_TAIL,
                )  # fmt: skip
            dk, dv = go_through(
                q, do, lse2, delta, dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots,
                v_slots, K, V, ds_slots, dq_slots, full, ring, before, begin, per_head, num_turns,
                batch, first_head, first_row, per_head, head_row, num_queries_padded, row, key0,
                num_keys, qk_scale,
                WHICH, GROUP, STAGES, HOLD_K, HOLD_V, False, KEY_TAIL,
            )  # fmt: skip
        # Looked up again: the loop has no registers for it.
        next_tile, next_batch, next_head = item_after(items_ptr, item)
        tile, batch, kv_head, item = item_at(items_ptr, item)
        meet(ITEMS, True)
        ring += num_turns
        if next_tile >= 0:
            fetch_item(
                q, k, v, do, lse2, delta, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots,
                kv_full, full, ring, next_tile, next_batch, next_head, num_heads,
                num_queries_padded, WHICH, GROUP, STAGES, CAUSAL,
            )  # fmt: skip
        key = tile * KEYS + WHICH * ROWS
        store_rows(dv_desc, batch, kv_head, key, num_keys, stage, dv, dtype)
        store_rows(dk_desc, batch, kv_head, key, num_keys, stage, dk * scale, dtype)
        done += 1
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
    HOLD_K: gl.constexpr,
    HOLD_V: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """num_queries_padded is a multiple of 128, to which L (inf) and D (0) are padded."""
    HEAD_DIM: gl.constexpr = k.block_shape[3]
    NEEDED: gl.constexpr = 2 if HEAD_DIM == 128 else 4
    gl.static_assert(STAGES == NEEDED)
    q_slots = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, ROWS, HEAD_DIM], q.layout)
    do_slots = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, ROWS, HEAD_DIM], do.layout)
    k_slots = gl.allocate_shared_memory(q.dtype, [1, 1, 1, KEYS, HEAD_DIM], k.layout)
    v_slots = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, HEAD_DIM], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], q.dtype)
    ds_slots = gl.allocate_shared_memory(q.dtype, [2, KEYS, ROWS], DS)
    dq_slots = gl.allocate_shared_memory(gl.float32, [2, 128, 32], dq.layout)
    out_slots = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, HEAD_DIM], dk.layout)
    l_slots = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse2.layout)
    d_slots = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=2)
    fence_async_shared()
    shared = (
        q, k, v, do, lse2, delta, dq, dk, dv, q_slots, do_slots, l_slots, d_slots, k_slots,
        v_slots, ds_slots, dq_slots, out_slots, kv_full, full,
        items_ptr, num_heads, num_queries_padded, num_keys, qk_scale, scale,
    )  # fmt: skip
    # Constants stay such only outside of variables. Gluon has no unpacking.
    gl.warp_specialize(
        [
            (
                compute,
                (0, GROUP, STAGES, HOLD_K, HOLD_V, CAUSAL, KEY_TAIL, HEAD_DIM) + shared,
            ),
            (
                compute,
                (1, GROUP, STAGES, HOLD_K, HOLD_V, CAUSAL, KEY_TAIL, HEAD_DIM) + shared,
            ),
        ],
        [4],
        [256],
    )
