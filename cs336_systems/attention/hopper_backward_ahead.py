"""A turn of `hopper_backward` with AHEAD: the scores of each are computed during the one before.

Without it all wait at the beginning of a turn for S, and at its end for dQ to be sent off; the
tensor cores have little to do meanwhile. Here a turn begins with P in registers and ends with the
next one's:
  dP^T = V dO^T
  dS^T = P^T (dP^T - D), published
  dV += P^T dO
  wait for the other group's dS^T           [dV]
  dQ = dS K, the next S^T = K Q^T
  send dQ off                               [S^T]
  dK += dS^T Q
  the next P^T = exp2(S^T - L)              [dK]
The last turn computes its S once more for nothing.

What decides the order are registers, of which 128 hold dK and dV, and ptxas, which lets nothing be
in flight where it does not see what a wait leaves: so nothing is when a turn ends.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cs336_systems.attention.hopper_common import ROWS, hand_back, meet, sums_layout
from cs336_systems.attention.hopper_gradients import KEYS, Q_BARRIERS, send, times_keys, weights


@gluon.jit
def one_turn_ahead(
    dk, dv, dq, q_slots, do_slots, l_slots, d_slots, k_slots, v_slots, K, V, ds_slots, dq_slots,
    q_full, do_full, P, turn, last, row, next_row0, key0, num_keys, qk_scale,
    PARITY: gl.constexpr, WHICH: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    HOLD: gl.constexpr, CAUSAL: gl.constexpr, KEY_TAIL: gl.constexpr,
):  # fmt: skip
    """One turn of those up to `last`, and P of the next, whose first query is next_row0. The rest
    is as in `hopper_backward.one_turn`."""
    dtype: gl.constexpr = q_slots.dtype
    HEAD_DIM: gl.constexpr = q_slots.shape[4]
    S_LAYOUT: gl.constexpr = sums_layout(ROWS)
    HELD: gl.constexpr = gl.DotOperandLayout(0, sums_layout(HEAD_DIM), 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    SPLIT: gl.constexpr = HEAD_DIM == 128
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

    mbarrier.wait(do_full.index(do_slot), (turn // DO_STAGES) & 1)
    dP = warpgroup_mma(V, dO.permute((1, 0)), zeros, use_acc=False, is_async=True)
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
    dv = warpgroup_mma_wait(1 if MINE else 0, (dv,))
    hand_back(Q_BARRIERS + Q_STAGES + do_slot, 2)
    following = gl.minimum(turn + 1, last)
    slot = following % Q_STAGES
    mbarrier.wait(q_full.index(slot), (following // Q_STAGES) & 1)
    Q_next = q_slots.index(slot).reshape([ROWS, HEAD_DIM])
    S = warpgroup_mma(K, Q_next.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if MINE:
        dQ_now = warpgroup_mma_wait(1, (dQ,))
        send(dq, dq_slots.index(WHICH), dQ_now, row, WHICH, SPLIT)
    else:
        # Triton wants one between turns; here warps are close together.
        gl.thread_barrier()
    # Not behind dK: loads from shared memory and products are in one queue.
    L = l_slots.index(slot).load(COLS)
    dk = warpgroup_mma(gl.convert_layout(dS, HELD), Q, dk, is_async=True)
    S_now = warpgroup_mma_wait(1, (S,))
    P = weights(S_now, L, next_row0, key0, num_keys, qk_scale, WHICH, CAUSAL, KEY_TAIL, True)
    dk = warpgroup_mma_wait(0, (dk,))
    hand_back(Q_BARRIERS + q_slot, 2)
    return dk, dv, P
