"""FlashAttention-2's forward pass in portable Triton: one program per tile of queries.

Legend, after the paper: S = scale * Q K^T in base-2 units, P = exp2(S - m), m_i and l_i a row's
running maximum and sum, L its log-sum-exp.

Source: Dao 2023 (FlashAttention-2), algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cs336_systems.attention.triton_common import LN_2, head_of, load_tile, locate, store_tile


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    o_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    num_heads,
    num_batch_heads,
    num_queries,
    num_keys,
    num_tiles,
    section,
    qk_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute O and L of BLOCK_M queries; qk_scale is |scale| * log2(e) > 0, NEGATE its sign."""
    tile, batch_head = locate(tl.program_id(0), num_tiles, num_batch_heads, section)
    if CAUSAL:  # The last queries see the most keys: longest first.
        tile = num_tiles - 1 - tile
    batch, head = batch_head // num_heads, batch_head % num_heads
    kv_head = head // GROUP
    k = head_of(k, stride_kb, stride_kh, batch, kv_head, TMA)
    v = head_of(v, stride_vb, stride_vh, batch, kv_head, TMA)
    row0 = tile * BLOCK_M
    offs_m = row0 + tl.arange(0, BLOCK_M)

    Q = load_tile(
        head_of(q, stride_qb, stride_qh, batch, head, TMA),
        stride_qm, batch, head, row0, num_queries,
        BLOCK_M, HEAD_DIM, HEAD_PAD, True, TMA, WIDE,
    )  # fmt: skip
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_PAD), tl.float32)

    # Keys before `unmasked` are seen by every query of the tile, keys from `visible` on by none.
    unmasked = num_keys // BLOCK_N * BLOCK_N
    visible = num_keys
    if CAUSAL:
        unmasked = tl.minimum(unmasked, (row0 + 1) // BLOCK_N * BLOCK_N)
        visible = tl.minimum(num_keys, row0 + BLOCK_M)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, Q, k, v, stride_kn, stride_vn, batch, kv_head, offs_m, 0, unmasked,
        num_keys, qk_scale,
        HEAD_DIM, HEAD_PAD, BLOCK_N, CAUSAL, False, NEGATE, PRECISION, TMA, WIDE,
    )  # fmt: skip
    if CAUSAL or KEY_TAIL:
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, Q, k, v, stride_kn, stride_vn, batch, kv_head, offs_m, unmasked, visible,
            num_keys, qk_scale,
            HEAD_DIM, HEAD_PAD, BLOCK_N, CAUSAL, True, NEGATE, PRECISION, TMA, WIDE,
        )  # fmt: skip

    lse = (m_i + tl.log2(l_i)) * LN_2
    lse_rows = lse_ptr + batch_head.to(tl.int64) * num_queries + offs_m
    tl.store(lse_rows, lse, mask=offs_m < num_queries)
    o_head = head_of(o_ptr, stride_ob, stride_oh, batch, head, False)
    store_tile(
        o_head, stride_om, row0, num_queries, acc / l_i[:, None], BLOCK_M, HEAD_DIM, HEAD_PAD, WIDE
    )


@triton.jit
def _attend(
    acc,
    l_i,
    m_i,
    Q,
    k,
    v,
    stride_kn,
    stride_vn,
    batch,
    kv_head,
    offs_m,
    start,
    stop,
    num_keys,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Let the queries see keys start..stop: rescale what is there, add what is new."""
    for n0 in tl.range(start, stop, BLOCK_N, disable_licm=PRECISION != "ieee"):
        K = load_tile(
            k, stride_kn, batch, kv_head, n0, num_keys,
            BLOCK_N, HEAD_DIM, HEAD_PAD, MASKED, TMA, WIDE,
        )  # fmt: skip
        S = tl.dot(Q, K.T, input_precision=PRECISION)
        if NEGATE:
            S = -S
        if MASKED:
            offs_n = n0 + tl.arange(0, BLOCK_N)
            seen = (offs_n < num_keys)[None, :]
            if CAUSAL:
                seen = seen & (offs_m[:, None] >= offs_n[None, :])
            S = tl.where(seen, S, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(S, 1) * qk_scale)
        P = tl.exp2(S * qk_scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(P, 1)
        acc = acc * alpha[:, None]
        V = load_tile(
            v, stride_vn, batch, kv_head, n0, num_keys,
            BLOCK_N, HEAD_DIM, HEAD_PAD, MASKED, TMA, WIDE,
        )  # fmt: skip
        acc = tl.dot(P.to(V.dtype), V, acc, input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i
