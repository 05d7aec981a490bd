"""The Hopper kernels in our interpreter: right for any shape in any order; mistakes are found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from gluon_interpreter import Change, InterpreterError, interpret
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_within_budget, let_grow, term_magnitudes
from torch import Tensor

from cs336_systems.attention import hopper_launch
from cs336_systems.attention.hopper_launch import (
    BACKWARD,
    FORWARD,
    FOUR_GROUPS,
    THREE_GROUPS,
    BackwardTile,
    ForwardTile,
    plan_hopper_backward,
    plan_hopper_forward,
)
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.attention.triton_launch import plan_postprocess, plan_preprocess

EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 449]
FORWARD_TILES = {
    64: [
        FORWARD[64],
        replace(FORWARD[64], ping_pong=False),
        replace(FORWARD[64], persistent=False),
        replace(FORWARD[64], num_groups=2, num_stages=3),
        FOUR_GROUPS,
        replace(FORWARD[64], threes=False, early=False, hold=True),
    ],
    128: [
        FORWARD[128],
        replace(FORWARD[128], ping_pong=False),
        replace(FORWARD[128], early=True),
        replace(FORWARD[128], hold=False),
    ],
}
BACKWARD_TILES = {
    64: [
        BACKWARD[64],
        replace(BACKWARD[64], hold_k=False, hold_v=False, persistent=False),
        THREE_GROUPS,
        replace(THREE_GROUPS, num_stages=2, persistent=False),
    ],
    128: [
        BACKWARD[128],
        replace(BACKWARD[128], hold_k=True, hold_v=False),
    ],
}


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, seed: int,
    tile: ForwardTile | None = None, change: Change | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return O and L of the forward kernel."""
    o, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:-1], float("nan"))
    with mock.patch.object(hopper_launch, "num_multiprocessors", return_value=1 + seed % 3):
        launch = plan_hopper_forward(q, k, v, o, lse, causal=is_causal, scale=scale, tile=tile)
    interpret(launch, seed, change)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, *, is_causal: bool,
    scale: float, seed: int, tile: BackwardTile | None = None, change: Change | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return dQ, dK and dV of the backward kernel; L and D are exact."""
    num_queries = q.shape[2]
    rows = math.ceil(num_queries / 128) * 128
    lse2 = torch.full((*q.shape[:2], rows), float("inf"))
    padded_delta = torch.zeros_like(lse2)
    lse2[..., :num_queries] = (lse * math.log2(math.e)).float()
    padded_delta[..., :num_queries] = delta.float()
    dq_sum = torch.zeros(lse2.numel(), q.shape[3])
    dk, dv = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    with mock.patch.object(hopper_launch, "num_multiprocessors", return_value=1 + seed % 3):
        launch = plan_hopper_backward(
            q, k, v, do, in_fragments(lse2), in_fragments(padded_delta), dq_sum, dk, dv,
            causal=is_causal, scale=scale, tile=tile,
        )  # fmt: skip
    interpret(launch, seed, change)
    dq = rows_of(dq_sum).view(*lse2.shape, -1)[:, :, :num_queries] * scale
    return [dq.to(q.dtype), dk, dv]


def in_fragments(numbers: Tensor) -> Tensor:
    """Return numbers, one a query, of every 64 in the order in which threads hold them."""
    place = torch.arange(64)
    bits = {}
    for name, count in (("e", 2), ("eight", 2), ("lane", 4), ("pair", 4)):
        bits[name], place = place % count, place // count
    column = bits["pair"] * 16 + bits["eight"] * 8 + bits["lane"] * 2 + bits["e"]
    return numbers.view(-1, 64)[:, column].view_as(numbers)


def rows_of(dq_sum: Tensor) -> Tensor:
    """Return the dQ buffer's rows: element by element, by the bits of its place."""
    head_dim = dq_sum.shape[1]
    place = torch.arange(64 * head_dim)
    bits = {}
    for name, count in (("e", 2), ("half", 2), ("lane", 4), ("row", 8), ("warp", 4), ("block", 8)):
        bits[name], place = place % count, place // count
    row = bits["warp"] * 16 + bits["half"] * 8 + bits["row"]
    column = place * 64 + bits["block"] * 8 + bits["lane"] * 2 + bits["e"]
    result = torch.empty_like(dq_sum).view(-1, 64, head_dim)
    result[:, row, column] = dq_sum.view(-1, 64 * head_dim)
    return result.view(-1, head_dim)


def make(
    seed: int, heads: tuple[int, int], lengths: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1])]
    q, k, v, do = (
        torch.randn(1, *shape, head_dim, generator=generator).to(dtype)
        for shape in (*shapes, shapes[0])
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do


def check(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, seed: int, is_causal: bool,
    scale: float | None = None, tiles: tuple[Any, Any] = (None, None),
    changes: tuple[Change | None, Change | None] = (None, None),
) -> None:  # fmt: skip
    """Hold O, L and the gradients to what the plain formula errs in the same dtype."""
    exact = reference_gradients(q, k, v, do, is_causal=is_causal, scale=scale)
    o = scaled_dot_prod_attention(q, k, v, is_causal=is_causal, scale=scale)
    plain = [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]
    magnitudes = term_magnitudes(q, k, v, do, scale=scale, rounded_scores=True)
    how: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "seed": seed,
    }
    q, k, v = q.detach(), k.detach(), v.detach()
    got, lse = forward(q, k, v, **how, tile=tiles[0], change=changes[0])
    delta = (exact.o * do.double()).sum(-1)
    gradients = backward(
        q, k, v, do, exact.lse, delta, **how, tile=tiles[1], change=changes[1]
    )  # fmt: skip
    truth = [exact.o, exact.dq, exact.dk, exact.dv]
    assert_within_budget([got, *gradients], plain, truth, magnitudes)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**16),
    group=st.sampled_from([1, 2, 3]),
    kv_heads=st.sampled_from([1, 2]),
    lengths=st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.05, 1.0]),
    data=st.data(),
)
def test_any_shape_in_any_order(
    seed: int,
    group: int,
    kv_heads: int,
    lengths: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    scale: float | None,
    data: st.DataObject,
) -> None:
    tiles = tuple(
        data.draw(st.sampled_from(table[head_dim])) for table in (FORWARD_TILES, BACKWARD_TILES)
    )
    inputs = make(seed, (group * kv_heads, kv_heads), lengths, head_dim, dtype)
    check(*inputs, seed=seed, is_causal=is_causal, scale=scale, tiles=(tiles[0], tiles[1]))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_queries", [1, 130, 256])
def test_what_goes_before_and_after_is_in_the_order_of_threads(
    head_dim: int, num_queries: int
) -> None:
    """L, D and the dQ buffer, against the kernels that leave them in the order of rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, _, _, do = make(3, (2, 1), (num_queries, 1), head_dim, torch.float16)
    o, do = q.detach().to(device), do.to(device)
    dq = torch.empty_like(do)
    lse = torch.randn(1, 2, num_queries, device=device)
    rows = math.ceil(num_queries / 128) * 128
    got = {}
    for fragments in (False, True):
        lse2, delta = (torch.full((1, 2, rows), float("nan"), device=device) for _ in range(2))
        sums = torch.full((2 * rows, head_dim), float("nan"), device=device)
        plan_preprocess(o, do, lse, lse2, delta, sums, fragments=fragments).run()
        assert (sums == 0).all()
        got[fragments] = lse2.cpu(), delta.cpu()
    for plain, held in zip(got[False], got[True], strict=True):
        torch.testing.assert_close(held, in_fragments(plain), rtol=0, atol=0)
    sums = torch.randn(2 * rows, head_dim, device=device)
    plan_postprocess(sums, dq, rows, 0.5, fragments=True).run()
    wanted = rows_of(sums.cpu()).view(1, 2, rows, head_dim)[:, :, :num_queries] * 0.5
    torch.testing.assert_close(dq.cpu(), wanted.to(dq.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_gets_no_weight_where_all_logits_are_very_negative(
    is_causal: bool, head_dim: int
) -> None:
    """Past the last key a tile reads 0: a logit far above the rest, whose weight overflows."""
    q, k, v, do = make(0, (1, 1), (70, 133), head_dim, torch.bfloat16)
    q, k = (tensor.detach().abs() + 3.0 for tensor in (q, k))
    q, k = q.requires_grad_(), (-k).requires_grad_()
    check(q, k, v, do, seed=0, is_causal=is_causal, scale=1.0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("per_tile", [3.0, 20.0])
def test_maxima_grow_by_less_and_by_more_than_the_slack(
    is_causal: bool, head_dim: int, per_tile: float
) -> None:
    inputs = make(2, (1, 1), (300, 800), head_dim, torch.bfloat16)
    let_grow(*inputs[:2], per_tile)
    check(*inputs, seed=2, is_causal=is_causal)


def all_negative(num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs whose logits are all negative and grow by hundreds against the order of the
    tiles, which begins with the last keys."""
    q, k, v, do = make(3, (1, 1), (130, num_keys), 64, torch.bfloat16)
    with torch.no_grad():
        q.copy_(q * 0.1 + 1.0)
        k.copy_(k * 0.1 - 1.0 - torch.arange(num_keys)[:, None] / 64.0)
    return q, k, v, do


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tile", [FORWARD[64], replace(FORWARD[64], early=False)])
def test_maxima_that_are_negative_and_grow(tile: ForwardTile, is_causal: bool) -> None:
    check(*all_negative(700), seed=3, is_causal=is_causal, scale=1.0, tiles=(tile, None))


def test_integers_alone_would_miss_maxima_that_are_negative_and_grow() -> None:
    change = ("gl.min(m_i, 0) < -SLACK", "gl.min(m_i, 0) < -1e9")
    with pytest.raises(AssertionError):
        check(*all_negative(700), seed=3, is_causal=False, scale=1.0, changes=(change, None))


# A mistake each, in the words of the source; an error or a wrong number is to show it.
# (K given back too early would not: V, which is fetched after it, is not.)
FORWARD_MISTAKES = {
    "V given back while it is read": (
        "acc = warpgroup_mma_wait(0, (acc,))\n            "
        "hand_back(V_BARRIERS + before, NUM_GROUPS)",
        "hand_back(V_BARRIERS + before, NUM_GROUPS)\n            "
        "acc = warpgroup_mma_wait(0, (acc,))",
    ),
    "K read before it is there": (
        "mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)\n        K =",
        "K =",
    ),
    "the other parity": (
        "mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)",
        "mbarrier.wait(v_full.index(before), (at // STAGES) & 1)",
    ),
    "one group alone frees a slot": (
        "take_back(V_BARRIERS + slot, NUM_GROUPS)",
        "take_back(V_BARRIERS + slot, 1)",
    ),
    "no fence before O is sent": (
        ".store(acc.to(dtype))\n    fence_async_shared()",
        ".store(acc.to(dtype))",
    ),
    "Q given back while it is read": (
        "    mbarrier.wait(q_full.index(WHICH), done & 1)\n",
        "    mbarrier.wait(q_full.index(WHICH), done & 1)\n    release(q_empty.index(WHICH))\n",
    ),
    "Q of the item before": ("mbarrier.wait(q_full.index(WHICH), done & 1)", "pass"),
    "O overwritten while it leaves": ("    tma.store_wait(0)  # of the item before\n", ""),
    "the ring begins anew": ("        ring += num\n    tma", "    tma"),
    "the last V not given back": (
        "hand_back(V_BARRIERS + slot, NUM_GROUPS)\n    acc = acc * gl.convert_layout(1.0",
        "acc = acc * gl.convert_layout(1.0",
    ),
    "S taken while in flight": (
        "S = warpgroup_mma_wait(1, (S,))",
        "S = warpgroup_mma_wait(2, (S,))",
    ),
    "O not multiplied where the maximum grew": (
        "acc = times(acc, factors, HEAD_DIM)",
        "pass",
    ),
    "skipped tiles not given back": (
        "mbarrier.wait(v_full.index(slot), parity)\n        "
        "hand_back(V_BARRIERS + slot, NUM_GROUPS)",
        "mbarrier.wait(v_full.index(slot), parity)",
    ),
    "K and V share barriers": ("V_BARRIERS + before", "NUM_GROUPS + before"),
}
FOUR_GROUPS_MISTAKES = {
    "K and V given back while V is read": (
        "        if V_BARRIERS > NUM_GROUPS:\n"
        "            hand_back(NUM_GROUPS + slot, NUM_GROUPS)\n        m_tile",
        "        hand_back(NUM_GROUPS + slot, NUM_GROUPS)\n        m_tile",
    ),
    "three groups free a slot": (
        "take_back(NUM_GROUPS + slot, NUM_GROUPS)",
        "take_back(NUM_GROUPS + slot, NUM_GROUPS - 1)",
    ),
    "V of the tile before not waited for": (
        "mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)",
        "pass",
    ),
    "the last tile not given back": (
        "hand_back(V_BARRIERS + slot, NUM_GROUPS)\n    acc = acc * gl.convert_layout(1.0",
        "acc = acc * gl.convert_layout(1.0",
    ),
}
BACKWARD_MISTAKES = {
    "dS of the other group not waited for": (
        "meet(0 if SPLIT else PARITY, MINE)",
        "meet(0 if SPLIT else PARITY, False)",
    ),
    "one buffer of dS": ("dS_all = ds_slots.index(at & 1)", "dS_all = ds_slots.index(0)"),
    "no fence behind dS": ("dv, is_async=True)\n    fence_async_shared()", "dv, is_async=True)"),
    "dQ's staging overwritten": ("    tma.store_wait(0)  # what the slot had before\n", ""),
    "groups share dQ's way out": ("send(dq, dq_slots.index(WHICH)", "send(dq, dq_slots.index(0)"),
    "a slot filled while it is read": (
        "at + STAGES // 2 + more, turn + STAGES // 2 + more,",
        "at + STAGES // 2 + more + 1, turn + STAGES // 2 + more + 1,",
    ),
    "asked for before groups meet": (
        "fence_async_shared()\n    meet(0 if SPLIT else PARITY, MINE)",
        "fence_async_shared()",
    ),
    "Q and dO read before they are there": (
        "mbarrier.wait(full.index(slot), (at // STAGES) & 1)",
        "pass",
    ),
    "dO not waited for": ("= do.block_type.nbytes + delta", "= delta"),
    "a turn that is not there": ("wanted = turn < num_turns", "wanted = turn < num_turns + 1"),
    "the last turn not asked for": ("wanted = turn < num_turns", "wanted = turn < num_turns - 1"),
    "dV taken while in flight": (
        "dv = warpgroup_mma_wait(0, (dv,))",
        "dv = warpgroup_mma_wait(1, (dv,))",
    ),
    "dQ taken while in flight": (
        "dQ_now = warpgroup_mma_wait(1, (dQ,))",
        "dQ_now = warpgroup_mma_wait(2, (dQ,))",
    ),
    "the second turn not masked": ("begin = 2\n", "begin = 1\n"),
    "L of another turn": (
        "lse2, [row], here, l_slots.index(slot)",
        "lse2, [row], here, l_slots.index(0)",
    ),
    "K and V of the item before": ("mbarrier.wait(kv_full.index(0), done & 1)", "pass"),
    "K overwritten while it is read": ("meet(ITEMS, True)", "meet(ITEMS, False)"),
    "dK and dV share their way out": ("    tma.store_wait(0)\n    gl.thread_barrier()\n", ""),
    "the ring begins anew": ("        ring += num_turns\n", ""),
    "dQ of the wrong row": ("at = row * 4", "at = row * 2"),
}


# Of the same kernel at head dim 64.
TAKING_TURNS_MISTAKES = {
    "Q there is taken for dO there": (
        "mbarrier.init(full.index(slot), count=2)",
        "mbarrier.init(full.index(slot), count=1)",
    ),
    "dO asked for a turn late": (
        "FIRST: gl.constexpr = WHICH if STAGES == 4 else 0",
        "FIRST: gl.constexpr = 0",
    ),
    "a slot filled while it is read": (
        "at + STAGES // 2 + more, turn + STAGES // 2 + more,",
        "at + STAGES // 2 + more + 1, turn + STAGES // 2 + more + 1,",
    ),
    "who does not wait asks": (
        "    if MINE:\n        # Both groups",
        "    if True:\n        # Both groups",
    ),
    "both ask for Q": ("if SHARE != 1:", "if True:"),
    "K overwritten while it is read": ("meet(ITEMS, True)", "meet(ITEMS, False)"),
}


# Of the kernel with three groups.
THREE_GROUPS_MISTAKES = {
    "dS of the other groups not waited for": (
        "meet(WHICH, True, GROUPS)",
        "meet(WHICH, False, GROUPS)",
    ),
    "dS of one other group not waited for": (
        "meet(WHICH, True, GROUPS)",
        "meet(WHICH, True, GROUPS - 1)",
    ),
    "two buffers of dS": ("ds_slot = owner * GROUPS", "ds_slot = turn % 2 * GROUPS"),
    "no fence behind dS": ("dv, is_async=True)\n    fence_async_shared()", "dv, is_async=True)"),
    "dQ of one group's keys": ("k_slots.index(group + nothing)", "k_slots.index(nothing)"),
    "groups share dQ's way out": ("send(dq, dq_slots.index(WHICH)", "send(dq, dq_slots.index(0)"),
    "asked for before groups meet": (
        "        meet(WHICH, True, GROUPS)\n        dQ",
        "        come_to_meet(WHICH, GROUPS)\n        dQ",
    ),
    "a slot filled while it is read": (
        "at + STAGES - 1,\n            turn + STAGES - 1,",
        "at + STAGES,\n            turn + STAGES,",
    ),
    "Q and dO read before they are there": (
        "mbarrier.wait(full.index(slot), (at // STAGES) & 1)",
        "pass",
    ),
    "dO not waited for": ("= do.block_type.nbytes + delta", "= delta"),
    "the last turn not asked for": ("wanted = turn < num_turns", "wanted = turn < num_turns - 1"),
    "dK taken while in flight": (
        "dv, dk = warpgroup_mma_wait(0, (dV, dK))",
        "dv, dk = warpgroup_mma_wait(1, (dV, dK))",
    ),
    "D added and not taken off": ("D[None, :] * (zeros + 1.0)", "D[None, :] * (zeros - 1.0)"),
    "K and V of the item before": ("mbarrier.wait(kv_full.index(0), done & 1)", "pass"),
    "K overwritten while it is read": (
        "meet(ITEMS, WHICH == 0, GROUPS)",
        "meet(ITEMS, False, GROUPS)",
    ),
    "dK on its way out where the next dS is": (
        "        tma.store_wait(0)  # dK of the item before: it was where dS will be\n",
        "",
    ),
    "dV on its way out where dS is multiplied": (
        "ds_slots.index((ring + num_turns) % GROUPS * GROUPS + WHICH)",
        "ds_slots.index((ring + num_turns + 2) % GROUPS * GROUPS + WHICH)",
    ),
    "the ring begins anew": ("        ring += num_turns\n", ""),
    "the first queries left out": (
        "gl.minimum(key0, num_queries_padded - LEAST)",
        "gl.minimum(key0 + ROWS, num_queries_padded - LEAST)",
    ),
}


def is_found(
    changes: tuple[Change | None, Change | None],
    head_dim: int,
    num_orders: int = 8,
    tiles: tuple[ForwardTile | None, BackwardTile | None] = (None, None),
) -> bool:
    """Tell whether one of a few orders shows a mistake."""
    for seed in range(num_orders):
        for lengths, is_causal in (((500, 600), True), ((200, 1200), False)):
            inputs = make(1, (3, 1), lengths, head_dim, torch.float16)
            if seed % 2:
                let_grow(*inputs[:2], 20.0)
            try:
                check(*inputs, seed=seed, is_causal=is_causal, tiles=tiles, changes=changes)
            except (InterpreterError, AssertionError):
                return True
    return False


@pytest.mark.parametrize("mistake", FORWARD_MISTAKES)
def test_mistakes_of_the_forward_kernel_are_found(mistake: str) -> None:
    assert is_found((FORWARD_MISTAKES[mistake], None), 64)


@pytest.mark.parametrize("mistake", FOUR_GROUPS_MISTAKES)
def test_mistakes_of_the_forward_kernel_with_four_groups_are_found(mistake: str) -> None:
    assert is_found((FOUR_GROUPS_MISTAKES[mistake], None), 64, tiles=(FOUR_GROUPS, None))


@pytest.mark.parametrize("mistake", BACKWARD_MISTAKES)
def test_mistakes_of_the_backward_kernel_are_found(mistake: str) -> None:
    assert is_found((None, BACKWARD_MISTAKES[mistake]), 128)


@pytest.mark.parametrize("mistake", TAKING_TURNS_MISTAKES)
def test_mistakes_of_the_backward_kernel_whose_groups_take_turns_are_found(
    mistake: str,
) -> None:
    assert is_found((None, TAKING_TURNS_MISTAKES[mistake]), 64)


@pytest.mark.parametrize("mistake", THREE_GROUPS_MISTAKES)
def test_mistakes_of_the_backward_kernel_with_three_groups_are_found(mistake: str) -> None:
    assert is_found((None, THREE_GROUPS_MISTAKES[mistake]), 64, tiles=(None, THREE_GROUPS))


@pytest.mark.parametrize(("head_dim", "tile"), [(64, None), (128, None), (64, THREE_GROUPS)])
def test_without_a_mistake_nothing_is_found(head_dim: int, tile: BackwardTile | None) -> None:
    assert not is_found((None, None), head_dim, num_orders=3, tiles=(None, tile))
