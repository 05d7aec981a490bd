"""FlashAttention-2's backward pass in portable Triton, from L and D = rowsum(dO * O).

Two ways. In one pass, each program owns a tile of keys, computes P once, and adds its share of dQ
to an fp32 buffer with atomic additions: five products, in an order that differs from run to run.
In two passes, a second kernel owns tiles of queries and computes P again: seven products, bitwise
repeatable.

The tile of keys comes first in every product (S^T, P^T, dP^T, dS^T), so that P^T and dS^T are left
operands straight from registers.

Source: Dao 2023 (FlashAttention-2), algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cs336_systems.attention.triton_common import (
    LOG2_E,
    head_of,
    hold,
    load_statistic,
    load_tile,
    locate,
    store_tile,
    tile_pointers,
)


@triton.jit
def preprocess_kernel(
    o_ptr,
    do_ptr,
    lse_ptr,
    lse2_ptr,
    delta_ptr,
    dq_sum_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    stride_dob,
    stride_doh,
    stride_dom,
    num_heads,
    num_queries,
    num_queries_padded,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CLEAR: tl.constexpr,
    WIDE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Compute D and L in base 2 of BLOCK_M queries; CLEAR sets their rows of the dQ buffer to 0.

    FRAGMENTS: of every 64 rows in the order of `hopper_common.load_columns`.
    Rows that only pad the last tile get L = inf, so that P = 0.
    """
    pid = tl.program_id(0)
    batch_head, row0 = pid // num_tiles, pid % num_tiles * BLOCK_M
    batch, head = batch_head // num_heads, batch_head % num_heads
    o_head = head_of(o_ptr, stride_ob, stride_oh, batch, head, False)
    do_head = head_of(do_ptr, stride_dob, stride_doh, batch, head, False)
    O = load_tile(  # noqa: E741
        o_head, stride_om, batch, head, row0, num_queries,
        BLOCK_M, HEAD_DIM, HEAD_PAD, True, False, WIDE,
    )  # fmt: skip
    dO = load_tile(
        do_head, stride_dom, batch, head, row0, num_queries,
        BLOCK_M, HEAD_DIM, HEAD_PAD, True, False, WIDE,
    )  # fmt: skip
    D = tl.sum(O.to(tl.float32) * dO.to(tl.float32), 1)
    offs_m = row0 + tl.arange(0, BLOCK_M)
    lse_rows = lse_ptr + batch_head.to(tl.int64) * num_queries + offs_m
    L = tl.load(lse_rows, mask=offs_m < num_queries, other=float("inf"))
    first = batch_head.to(tl.int64) * num_queries_padded + row0
    inside = offs_m < num_queries_padded
    places = tl.arange(0, BLOCK_M)
    if FRAGMENTS:
        places = (places & ~14) | (places & 6) << 1 | (places & 8) >> 2
    tl.store(delta_ptr + first + places, D, mask=inside)
    tl.store(lse2_ptr + first + places, L * LOG2_E, mask=inside)
    if CLEAR:
        clear = tile_pointers(dq_sum_ptr, HEAD_PAD, first, BLOCK_M, HEAD_PAD, False)
        tl.store(clear, tl.zeros((BLOCK_M, HEAD_PAD), tl.float32), mask=inside[:, None])


@triton.jit
def postprocess_kernel(
    dq_sum_ptr,
    dq_ptr,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    num_heads,
    num_queries,
    num_queries_padded,
    num_tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Scale the dQ buffer and round it to the queries' dtype.

    FRAGMENTS: it is in the order of the Hopper kernel, and BLOCK_M 64.
    """
    pid = tl.program_id(0)
    batch_head, row0 = pid // num_tiles, pid % num_tiles * BLOCK_M
    batch, head = batch_head // num_heads, batch_head % num_heads
    first = batch_head.to(tl.int64) * num_queries_padded + row0
    if FRAGMENTS:
        fragments = tl.load(dq_sum_ptr + first * HEAD_DIM + tl.arange(0, BLOCK_M * HEAD_DIM))
        bits = fragments.reshape(HEAD_DIM // 64, 8, 4, 8, 4, 2, 2)
        sums = bits.permute(2, 5, 3, 0, 1, 4, 6).reshape(BLOCK_M, HEAD_DIM)
    else:
        sums = tl.load(
            tile_pointers(dq_sum_ptr, HEAD_PAD, first, BLOCK_M, HEAD_PAD, False),
            mask=(row0 + tl.arange(0, BLOCK_M) < num_queries_padded)[:, None],
        )
    dq_head = head_of(dq_ptr, stride_dqb, stride_dqh, batch, head, False)
    store_tile(
        dq_head, stride_dqm, row0, num_queries, sums * scale, BLOCK_M, HEAD_DIM, HEAD_PAD, WIDE
    )


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    do,
    lse2_ptr,
    delta_ptr,
    dq_sum,
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    num_kv_heads,
    num_batch_heads,
    num_queries,
    num_queries_padded,
    num_keys,
    num_tiles,
    section,
    scale,
    qk_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    ADD_DQ: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute dK and dV of BLOCK_N keys over all queries of their group; ADD_DQ: in one pass."""
    tile, batch_head = locate(tl.program_id(0), num_tiles, num_batch_heads, section)
    batch, kv_head = batch_head // num_kv_heads, batch_head % num_kv_heads
    row0 = tile * BLOCK_N
    k = head_of(k, stride_kb, stride_kh, batch, kv_head, TMA)
    v = head_of(v, stride_vb, stride_vh, batch, kv_head, TMA)
    K = load_tile(
        k, stride_kn, batch, kv_head, row0, num_keys,
        BLOCK_N, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
    )  # fmt: skip
    V = load_tile(
        v, stride_vn, batch, kv_head, row0, num_keys,
        BLOCK_N, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
    )  # fmt: skip
    if HOLD:
        K = hold(K, BLOCK_N, HEAD_PAD)
    dK = tl.zeros((BLOCK_N, HEAD_PAD), tl.float32)
    dV = tl.zeros((BLOCK_N, HEAD_PAD), tl.float32)

    # Queries before `start` see none of these keys, queries from `unmasked` on see all of them.
    start, unmasked = 0, 0
    if CAUSAL:
        start = row0 // BLOCK_M * BLOCK_M
        unmasked = row0 + BLOCK_N - 1
    # Keys that do not exist must get no weight either.
    if KEY_TAIL:  # noqa: SIM102
        if row0 + BLOCK_N > num_keys:
            unmasked = num_queries
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = head_of(q, stride_qb, stride_qh, batch, head, TMA)
        do_head = head_of(do, stride_dob, stride_doh, batch, head, TMA)
        rows = (batch * num_kv_heads * GROUP + head).to(tl.int64)
        dK, dV = _gather(
            dK, dV, K, V, k, v, stride_kn, stride_vn, kv_head,
            q_head, do_head, lse2_ptr, delta_ptr, dq_sum, rows * num_queries_padded,
            stride_qm, stride_dom, batch, head, row0, start, unmasked, num_queries, num_keys,
            qk_scale, HEAD_DIM, HEAD_PAD, BLOCK_M, BLOCK_N, CAUSAL, KEY_TAIL, ADD_DQ,
            PRECISION, TMA, WIDE,
        )  # fmt: skip

    dk_head = head_of(dk_ptr, stride_dkb, stride_dkh, batch, kv_head, False)
    dv_head = head_of(dv_ptr, stride_dvb, stride_dvh, batch, kv_head, False)
    store_tile(dk_head, stride_dkn, row0, num_keys, dK * scale, BLOCK_N, HEAD_DIM, HEAD_PAD, WIDE)
    store_tile(dv_head, stride_dvn, row0, num_keys, dV, BLOCK_N, HEAD_DIM, HEAD_PAD, WIDE)


@triton.jit
def _gather(
    dK,
    dV,
    K,
    V,
    k,
    v,
    stride_kn,
    stride_vn,
    kv_head,
    q,
    do,
    lse2_ptr,
    delta_ptr,
    dq_sum,
    padded_row0,
    stride_qm,
    stride_dom,
    batch,
    head,
    row0,
    start,
    unmasked,
    num_queries,
    num_keys,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    ADD_DQ: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add what the queries from `start` on contribute to dK and dV, and to dQ."""
    SPLIT: tl.constexpr = PRECISION != "ieee"
    offs_n = row0 + tl.arange(0, BLOCK_N)
    for m0 in tl.range(start, num_queries, BLOCK_M, disable_licm=SPLIT):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        if SPLIT:  # Three parts of each number in registers all along would spill.
            K = load_tile(
                k, stride_kn, batch, kv_head, row0, num_keys,
                BLOCK_N, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
            )  # fmt: skip
            V = load_tile(
                v, stride_vn, batch, kv_head, row0, num_keys,
                BLOCK_N, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
            )  # fmt: skip
        L = load_statistic(lse2_ptr + padded_row0 + offs_m, TMA)
        Q, ST = _times_rows(
            K, q, stride_qm, batch, head, m0, num_queries,
            BLOCK_M, HEAD_DIM, HEAD_PAD, True, PRECISION, TMA, WIDE,
        )  # fmt: skip
        dO, dPT = _times_rows(
            V, do, stride_dom, batch, head, m0, num_queries,
            BLOCK_M, HEAD_DIM, HEAD_PAD, True, PRECISION, TMA, WIDE,
        )  # fmt: skip
        ST = ST * qk_scale - L[None, :]
        # Within the one loop: leaving a loop for the next drains its pipeline.
        if CAUSAL or KEY_TAIL:  # noqa: SIM102
            if m0 < unmasked:
                if CAUSAL:
                    seen = offs_m[None, :] >= offs_n[:, None]
                    if KEY_TAIL:
                        seen = seen & (offs_n < num_keys)[:, None]
                else:
                    seen = (offs_n < num_keys)[:, None]
                ST = tl.where(seen, ST, float("-inf"))
        PT = tl.exp2(ST)
        dV = tl.dot(PT.to(dO.dtype), dO, dV, input_precision=PRECISION)
        D = load_statistic(delta_ptr + padded_row0 + offs_m, TMA)
        dST = (PT * (dPT - D[None, :])).to(Q.dtype)
        dK = tl.dot(dST, Q, dK, input_precision=PRECISION)
        if ADD_DQ:
            dQT = tl.dot(K.T, dST, input_precision=PRECISION)
            if TMA:
                dq_sum.atomic_add([(padded_row0 + m0).to(tl.int32), 0], dQT.T)
            else:
                sums = tile_pointers(dq_sum, HEAD_PAD, padded_row0 + m0, BLOCK_M, HEAD_PAD, False)
                tl.atomic_add(sums, dQT.T, sem="relaxed")
    return dK, dV


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    do,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    num_heads,
    num_batch_heads,
    num_queries,
    num_queries_padded,
    num_keys,
    num_tiles,
    section,
    scale,
    qk_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute dQ of BLOCK_M queries: the second of two passes."""
    tile, batch_head = locate(tl.program_id(0), num_tiles, num_batch_heads, section)
    if CAUSAL:
        tile = num_tiles - 1 - tile
    batch, head = batch_head // num_heads, batch_head % num_heads
    kv_head = head // GROUP
    k = head_of(k, stride_kb, stride_kh, batch, kv_head, TMA)
    v = head_of(v, stride_vb, stride_vh, batch, kv_head, TMA)
    row0 = tile * BLOCK_M
    offs_m = row0 + tl.arange(0, BLOCK_M)
    q = head_of(q, stride_qb, stride_qh, batch, head, TMA)
    do = head_of(do, stride_dob, stride_doh, batch, head, TMA)
    Q = load_tile(
        q, stride_qm, batch, head, row0, num_queries,
        BLOCK_M, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
    )  # fmt: skip
    dO = load_tile(
        do, stride_dom, batch, head, row0, num_queries,
        BLOCK_M, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
    )  # fmt: skip
    if HOLD:
        Q = hold(Q, BLOCK_M, HEAD_PAD)
        dO = hold(dO, BLOCK_M, HEAD_PAD)
    rows = batch_head.to(tl.int64) * num_queries_padded + offs_m
    L, D = tl.load(lse2_ptr + rows), tl.load(delta_ptr + rows)
    dQ = tl.zeros((BLOCK_M, HEAD_PAD), tl.float32)

    unmasked = num_keys // BLOCK_N * BLOCK_N
    visible = num_keys
    if CAUSAL:
        unmasked = tl.minimum(unmasked, (row0 + 1) // BLOCK_N * BLOCK_N)
        visible = tl.minimum(num_keys, row0 + BLOCK_M)
    dQ = _spread(
        dQ, Q, dO, L, D, q, do, stride_qm, stride_dom, head, row0, num_queries,
        k, v, stride_kn, stride_vn, batch, kv_head, 0, unmasked, num_keys, qk_scale,
        HEAD_DIM, HEAD_PAD, BLOCK_M, BLOCK_N, CAUSAL, False, PRECISION, TMA, WIDE,
    )  # fmt: skip
    if CAUSAL or KEY_TAIL:
        dQ = _spread(
            dQ, Q, dO, L, D, q, do, stride_qm, stride_dom, head, row0, num_queries,
            k, v, stride_kn, stride_vn, batch, kv_head, unmasked, visible, num_keys, qk_scale,
            HEAD_DIM, HEAD_PAD, BLOCK_M, BLOCK_N, CAUSAL, True, PRECISION, TMA, WIDE,
        )  # fmt: skip
    dq_head = head_of(dq_ptr, stride_dqb, stride_dqh, batch, head, False)
    store_tile(
        dq_head, stride_dqm, row0, num_queries, dQ * scale, BLOCK_M, HEAD_DIM, HEAD_PAD, WIDE
    )


@triton.jit
def _spread(
    dQ,
    Q,
    dO,
    L,
    D,
    q,
    do,
    stride_qm,
    stride_dom,
    head,
    row0,
    num_queries,
    k,
    v,
    stride_kn,
    stride_vn,
    batch,
    kv_head,
    start,
    stop,
    num_keys,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add what keys start..stop contribute to dQ."""
    SPLIT: tl.constexpr = PRECISION != "ieee"
    offs_m = row0 + tl.arange(0, BLOCK_M)
    for n0 in tl.range(start, stop, BLOCK_N, disable_licm=SPLIT):
        if SPLIT:  # As in _gather.
            Q = load_tile(
                q, stride_qm, batch, head, row0, num_queries,
                BLOCK_M, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
            )  # fmt: skip
            dO = load_tile(
                do, stride_dom, batch, head, row0, num_queries,
                BLOCK_M, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
            )  # fmt: skip
        K, S = _times_rows(
            Q, k, stride_kn, batch, kv_head, n0, num_keys,
            BLOCK_N, HEAD_DIM, HEAD_PAD, MASKED, PRECISION, TMA, WIDE,
        )  # fmt: skip
        _, dP = _times_rows(
            dO, v, stride_vn, batch, kv_head, n0, num_keys,
            BLOCK_N, HEAD_DIM, HEAD_PAD, MASKED, PRECISION, TMA, WIDE,
        )  # fmt: skip
        S = S * qk_scale - L[:, None]
        if MASKED:
            offs_n = n0 + tl.arange(0, BLOCK_N)
            seen = (offs_n < num_keys)[None, :]
            if CAUSAL:
                seen = seen & (offs_m[:, None] >= offs_n[None, :])
            S = tl.where(seen, S, float("-inf"))
        P = tl.exp2(S)
        dS = (P * (dP - D[:, None])).to(K.dtype)
        dQ = tl.dot(dS, K, dQ, input_precision=PRECISION)
    return dQ


@triton.jit
def _times_rows(
    left,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return a tile of rows, and the product of what is left of it with its transpose."""
    tile = load_tile(
        source, stride_row, batch, head, row0, num_rows,
        ROWS, HEAD_DIM, HEAD_PAD, CHECK_ROWS, TMA, WIDE,
    )  # fmt: skip
    return tile, tl.dot(left, tile.T, input_precision=PRECISION)
