"""FlashAttention's forward pass on Hopper in Gluon: one warp fetches, warpgroups compute.

An item of work is NUM_GROUPS x 64 queries of one head; a program does one item after another, so
that the first tiles of the next are on their way while the results of the last are sent off. Its
producer warp has the tensor memory accelerator bring Q and the tiles of K and V, last ones first,
the latter into two rings of STAGES slots. Each consumer warpgroup owns 64 queries. It keeps two
products in flight: S of this turn and P V of the turn before, so that the exponentials of one tile
run under the product of another.

The mask is only in a group's first tile: 64 queries begin at a multiple of 64, so the diagonal
crosses one tile of 64 or 128 keys; the keys past the last one are in the same tile or in one that
no query of the group sees.

Legend, after the paper: S = scale * Q K^T in base-2 units, P = exp2(S - m), m_i a row's running
maximum or a little less, l_i its running sum, L its log-sum-exp. Any m gives the same result; m_i
follows the maximum only where it has grown by more than SLACK, so that O, which is then multiplied,
is hardly ever touched.

Source: Shah et al. 2024 (FlashAttention-3), section 3; Dao 2023 (FlashAttention-2), algorithm 1.
"""

# ruff: noqa: RUF005

from __future__ import annotations

from triton import constexpr_function
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
    item_after,
    item_at,
    meet,
    release,
    sums_layout,
    take_back,
)
from cs336_systems.attention.hopper_softmax import rescale, row_max, row_sum, times

LN_2 = gl.constexpr(0.6931471805599453)
SLACK = gl.constexpr(8.0)
"""By how much, in base 2, a row's maximum may pass m_i: weights are then at most 256."""


@constexpr_function
def v_barriers(num_groups, stages):
    """Return the first named barrier of V's slots. If there are more than two slots they are K's
    too, which then come back a turn later than they could."""
    return num_groups + (stages if stages == 2 else 0)


@gluon.jit
def num_key_tiles(stop_row, num_keys, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return how many tiles of keys the queries before stop_row see."""
    num = gl.cdiv(num_keys, BLOCK_N)
    if CAUSAL:
        num = gl.minimum(gl.cdiv(stop_row, BLOCK_N), num)
    return num


@gluon.jit
def produce(
    GROUP: gl.constexpr, NUM_GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    q, k, v, q_slots, k_slots, v_slots, q_full, q_empty, k_full, v_full,
    items_ptr, num_keys,
):  # fmt: skip
    """Fetch Q, then K and V tile by tile, as slots become free."""
    V_BARRIERS: gl.constexpr = v_barriers(NUM_GROUPS, STAGES)
    done, ring = 0, 0  # items, and tiles of keys
    tile, batch, head, following = item_at(items_ptr, gl.program_id(0))
    while tile >= 0:
        kv_head = head // GROUP
        row0 = tile * (NUM_GROUPS * ROWS)
        num = num_key_tiles(row0 + NUM_GROUPS * ROWS, num_keys, CAUSAL, BLOCK_N)
        for turn in range(num):
            at = ring + turn
            slot = at % STAGES
            key0 = (num - 1 - turn) * BLOCK_N
            if at >= STAGES:
                take_back(NUM_GROUPS + slot, NUM_GROUPS)
            mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k, [batch, kv_head, key0, 0], k_full.index(slot), k_slots.index(slot)
            )
            if turn == 0:
                for group in gl.static_range(NUM_GROUPS):
                    mbarrier.wait(q_empty.index(group), done & 1 ^ 1)
                    mbarrier.expect(q_full.index(group), q.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q, [batch, head, row0 + group * ROWS, 0], q_full.index(group),
                        q_slots.index(group),
                    )  # fmt: skip
            if V_BARRIERS > NUM_GROUPS:  # noqa: SIM102 (known when compiled)
                if at >= STAGES:
                    take_back(V_BARRIERS + slot, NUM_GROUPS)
            mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v, [batch, kv_head, key0, 0], v_full.index(slot), v_slots.index(slot)
            )
        done += 1
        ring += num
        tile, batch, head, following = item_at(items_ptr, following)


@gluon.jit
def go_through(
    WHICH: gl.constexpr, NUM_GROUPS: gl.constexpr, STAGES: gl.constexpr, THREES: gl.constexpr,
    PING_PONG: gl.constexpr, EARLY: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    dtype: gl.constexpr,
    Q, k_slots, v_slots, k_full, v_full, acc, P_half, m_i, l_i, begin, end, qk_scale,
):  # fmt: skip
    """Attend to the tiles of keys from `begin` to `end` in the ring, of which none is masked.

    P_half is P of the tile before, and P of the last tile where this returns. With THREES, m_i must
    be at least -SLACK: a tile of negative scores alone, whose maximum is not found, is then no
    reason to raise it.
    """
    S_LAYOUT: gl.constexpr = sums_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = sums_layout(HEAD_DIM)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    NEXT: gl.constexpr = (WHICH + 1) % NUM_GROUPS
    V_BARRIERS: gl.constexpr = v_barriers(NUM_GROUPS, STAGES)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, S_LAYOUT)
    for at in range(begin, end):
        slot, before = at % STAGES, (at - 1) % STAGES
        mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)
        K = k_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
        if PING_PONG:
            meet(WHICH, True)
        S = warpgroup_mma(Q, K.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
        V = v_slots.index(before).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(P_half, V, acc, is_async=True)
        if PING_PONG:
            meet(NEXT, False)
        S = warpgroup_mma_wait(1, (S,))
        if V_BARRIERS > NUM_GROUPS:
            hand_back(NUM_GROUPS + slot, NUM_GROUPS)
        m_tile = gl.convert_layout(row_max(S, BLOCK_N, THREES), S_ROWS) * qk_scale
        m_new = gl.where(m_tile > m_i + SLACK, m_tile, m_i)
        alpha = gl.exp2(m_i - m_new)
        factors = gl.convert_layout(alpha, O_ROWS)[:, None]
        if EARLY:
            acc = warpgroup_mma_wait(0, (acc,))
            hand_back(V_BARRIERS + before, NUM_GROUPS)
            acc = times(acc, factors, HEAD_DIM)
        P = gl.exp2(S * qk_scale - m_new[:, None])
        l_i = rescale(l_i, alpha) + row_sum(P, BLOCK_N)
        m_i = m_new
        if not EARLY:
            acc = warpgroup_mma_wait(0, (acc,))
            hand_back(V_BARRIERS + before, NUM_GROUPS)
            acc = times(acc, factors, HEAD_DIM)
        P_half = gl.convert_layout(P.to(dtype), P_LAYOUT)
    return acc, P_half, m_i, l_i


@gluon.jit
def attend(
    WHICH: gl.constexpr, NUM_GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr, PING_PONG: gl.constexpr, THREES: gl.constexpr, EARLY: gl.constexpr,
    HOLD: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    o, lse_ptr, q_slots, k_slots, v_slots, o_slots, q_full, q_empty, k_full, v_full,
    items_ptr, item, num_heads, tile, done, ring, num, num_queries, num_keys, qk_scale,
):  # fmt: skip
    """Attend with the 64 queries of warpgroup WHICH in one item, of `num` tiles of keys; return
    the row and the tile of the item that follows."""
    dtype: gl.constexpr = o.dtype
    S_LAYOUT: gl.constexpr = sums_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = sums_layout(HEAD_DIM)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    row0 = tile * (NUM_GROUPS * ROWS) + WHICH * ROWS
    first = num - num_key_tiles(row0 + ROWS, num_keys, CAUSAL, BLOCK_N)
    NEXT: gl.constexpr = (WHICH + 1) % NUM_GROUPS
    V_BARRIERS: gl.constexpr = v_barriers(NUM_GROUPS, STAGES)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, S_LAYOUT)
    Q = q_slots.index(WHICH).reshape([ROWS, HEAD_DIM])

    for at in range(ring, ring + first):  # tiles that only later groups see
        slot, parity = at % STAGES, (at // STAGES) & 1
        mbarrier.wait(k_full.index(slot), parity)
        if PING_PONG:
            meet(WHICH, True)  # every group takes as many turns
            meet(NEXT, False)
        if V_BARRIERS > NUM_GROUPS:
            hand_back(NUM_GROUPS + slot, NUM_GROUPS)
        mbarrier.wait(v_full.index(slot), parity)
        hand_back(V_BARRIERS + slot, NUM_GROUPS)

    mbarrier.wait(q_full.index(WHICH), done & 1)
    if HOLD:
        Q = Q.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
        release(q_empty.index(WHICH))
    slot = (ring + first) % STAGES
    mbarrier.wait(k_full.index(slot), ((ring + first) // STAGES) & 1)
    K = k_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
    if PING_PONG:
        meet(WHICH, True)
    S = warpgroup_mma(Q, K.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if PING_PONG:
        meet(NEXT, False)
    S = warpgroup_mma_wait(0, (S,))
    if V_BARRIERS > NUM_GROUPS:
        hand_back(NUM_GROUPS + slot, NUM_GROUPS)
    if CAUSAL or KEY_TAIL:
        cols = (num - 1 - first) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        last = num_keys - 1 + gl.zeros((ROWS,), gl.int32, S_ROWS)
        if CAUSAL:
            last = gl.minimum(last, row0 + gl.arange(0, ROWS, S_ROWS))
        S = gl.where(cols[None, :] <= last[:, None], S, float("-inf"))
    m_i = gl.max(S, 1) * qk_scale
    P = gl.exp2(S * qk_scale - m_i[:, None])
    l_i = row_sum(P, BLOCK_N)
    P_half = gl.convert_layout(P.to(dtype), P_LAYOUT)
    acc = gl.zeros((ROWS, HEAD_DIM), gl.float32, O_LAYOUT)

    begin, end = ring + first + 1, ring + num
    if not THREES or gl.min(m_i, 0) < -SLACK:
        acc, P_half, m_i, l_i = go_through(
            WHICH, NUM_GROUPS, STAGES, False, PING_PONG, EARLY, BLOCK_N, HEAD_DIM, dtype,
            Q, k_slots, v_slots, k_full, v_full, acc, P_half, m_i, l_i, begin, end, qk_scale,
        )  # fmt: skip
    else:
        acc, P_half, m_i, l_i = go_through(
            WHICH, NUM_GROUPS, STAGES, True, PING_PONG, EARLY, BLOCK_N, HEAD_DIM, dtype,
            Q, k_slots, v_slots, k_full, v_full, acc, P_half, m_i, l_i, begin, end, qk_scale,
        )  # fmt: skip

    if not HOLD:
        release(q_empty.index(WHICH))
    last_at = ring + num - 1
    slot = last_at % STAGES
    mbarrier.wait(v_full.index(slot), (last_at // STAGES) & 1)
    V = v_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma(P_half, V, acc, is_async=True)
    # Looked up here, where registers are free and there is time.
    next_tile, _, _ = item_after(items_ptr, item)
    tile, batch, head, item = item_at(items_ptr, item)
    row0 = tile * (NUM_GROUPS * ROWS) + WHICH * ROWS
    total = gl.convert_layout(gl.sum(l_i, 1), S_ROWS)
    lse = (m_i + gl.log2(total)) * LN_2
    tma.store_wait(0)  # of the item before
    acc = warpgroup_mma_wait(0, (acc,))
    hand_back(V_BARRIERS + slot, NUM_GROUPS)
    acc = acc * gl.convert_layout(1.0 / total, O_ROWS)[:, None]
    o_slots.index(WHICH).reshape([ROWS, HEAD_DIM]).store(acc.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    if row0 < num_queries:
        tma.async_copy_shared_to_global(o, [batch, head, row0, 0], o_slots.index(WHICH))
        rows = row0 + gl.arange(0, ROWS, S_ROWS)
        lse_rows = lse_ptr + (batch * num_heads + head).to(gl.int64) * num_queries
        gl.store(lse_rows + rows, lse, mask=rows < num_queries)
    return item, next_tile


@gluon.jit
def consume(
    WHICH: gl.constexpr, NUM_GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr, PING_PONG: gl.constexpr, THREES: gl.constexpr, EARLY: gl.constexpr,
    HOLD: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    o, lse_ptr, q_slots, k_slots, v_slots, o_slots, q_full, q_empty, k_full, v_full,
    items_ptr, num_heads, num_queries, num_keys, qk_scale,
):  # fmt: skip
    """Attend in all items of this program with warpgroup WHICH."""
    if PING_PONG and WHICH == NUM_GROUPS - 1:
        meet(0, False)
    done, ring = 0, 0
    item = gl.program_id(0)
    tile, _, _, _ = item_at(items_ptr, item)
    while tile >= 0:
        num = num_key_tiles((tile + 1) * (NUM_GROUPS * ROWS), num_keys, CAUSAL, BLOCK_N)
        item, tile = attend(
            WHICH, NUM_GROUPS, STAGES, CAUSAL, KEY_TAIL, PING_PONG, THREES, EARLY, HOLD, BLOCK_N,
            HEAD_DIM, o, lse_ptr, q_slots, k_slots, v_slots, o_slots, q_full, q_empty, k_full,
            v_full, items_ptr, item, num_heads, tile, done, ring, num, num_queries,
            num_keys, qk_scale,
        )  # fmt: skip
        done += 1
        ring += num
    tma.store_wait(0)


@constexpr_function
def worker_warps(num_groups):
    """Return how many warps each group but the first has, and the one that fetches."""
    return [4] * (num_groups - 1) + [1]


@constexpr_function
def worker_registers(num_groups):
    """Return the registers of each of their threads."""
    each, fetching = {2: (240, 24), 3: (160, 32), 4: (112, 24)}[num_groups]
    return [each] * (num_groups - 1) + [fetching]


@gluon.jit
def forward_kernel(
    q,
    k,
    v,
    o,
    lse_ptr,
    items_ptr,
    num_heads,
    num_queries,
    num_keys,
    qk_scale,
    GROUP: gl.constexpr,
    NUM_GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TAIL: gl.constexpr,
    PING_PONG: gl.constexpr,
    THREES: gl.constexpr,
    EARLY: gl.constexpr,
    HOLD: gl.constexpr,
):
    """Compute O and L; qk_scale is scale * log2(e) > 0."""
    BLOCK_N: gl.constexpr = k.block_shape[2]
    HEAD_DIM: gl.constexpr = k.block_shape[3]
    q_slots = gl.allocate_shared_memory(q.dtype, [NUM_GROUPS, 1, 1, ROWS, HEAD_DIM], q.layout)
    k_slots = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k.layout)
    v_slots = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v.layout)
    o_slots = gl.allocate_shared_memory(o.dtype, [NUM_GROUPS, 1, 1, ROWS, HEAD_DIM], o.layout)
    # Named barriers: the groups' turns, then K's and V's slots.
    gl.static_assert(v_barriers(NUM_GROUPS, STAGES) + STAGES <= NUM_BARRIERS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for group in gl.static_range(NUM_GROUPS):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()
    shared = (
        o, lse_ptr, q_slots, k_slots, v_slots, o_slots, q_full, q_empty, k_full, v_full,
        items_ptr, num_heads, num_queries, num_keys, qk_scale,
    )  # fmt: skip
    fetched = (
        q, k, v, q_slots, k_slots, v_slots, q_full, q_empty, k_full, v_full,
        items_ptr, num_keys,
    )  # fmt: skip
    # Constants stay such only outside of variables and on the left of a sum of tuples.
    gl.warp_specialize(
        [
            (
                consume,
                (group, NUM_GROUPS, STAGES, CAUSAL, KEY_TAIL, PING_PONG, THREES, EARLY, HOLD,
                 BLOCK_N, HEAD_DIM)
                + shared,
            )
            if group < NUM_GROUPS
            else (produce, (GROUP, NUM_GROUPS, STAGES, CAUSAL, BLOCK_N) + fetched)
            for group in (0, 1, 2, 3, 4)[: NUM_GROUPS + 1]
        ],
        worker_warps(NUM_GROUPS),
        worker_registers(NUM_GROUPS),
    )  # fmt: skip
