"""From tensors of any leading dimensions to kernels in order: outputs, tiles, launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import triton
from torch import Tensor

from cs336_systems.attention.tiles import ROWS_MULTIPLE, Tile, tiles_for
from cs336_systems.attention.triton_launch import (
    Launch,
    as_4d,
    head_pad,
    plan_forward,
    plan_keys,
    plan_postprocess,
    plan_preprocess,
    plan_queries,
)
from cs336_systems.table import interpreting


def forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O and L. A row that sees no key has O = 0 and L = -inf."""
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    q4, k4, v4 = as_4d(q), as_4d(k), as_4d(v)
    o = empty_like(q4)
    if k4.shape[2] == 0 or q4.numel() == 0:
        return o.zero_().view(q.shape), lse.fill_(float("-inf"))
    tile = tiles_for(q4).forward_for(k4.shape[2])
    launch = plan_forward(
        q4, k4, v4, o, lse, causal=is_causal, scale=scale, precision=precision(q.dtype), tile=tile
    )
    _run(q4, launch)
    return o.view(q.shape), lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV."""
    q4, k4, v4, o4 = as_4d(q), as_4d(k), as_4d(v), as_4d(o)
    dq, dk, dv = empty_like(q4), empty_like(k4), empty_like(v4)
    if k4.shape[2] == 0 or q4.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    else:
        # The gradient of a sum is one number expanded: no stride of 1 anywhere.
        do4 = as_4d(do if do.stride(-1) == 1 or do.shape[-1] == 1 else do.contiguous())
        one_pass = tiles_for(q4).one_pass
        if deterministic or torch.are_deterministic_algorithms_enabled():
            one_pass = None
        plan = _plan_two_passes if one_pass is None else partial(_plan_one_pass, one_pass)
        _run(q4, *plan(do4, q4, k4, v4, o4, lse, dq, dk, dv, is_causal, scale))
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _plan_one_pass(
    tile: Tile, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> list[Launch]:  # fmt: skip
    num_rows = triton.cdiv(q.shape[2], ROWS_MULTIPLE) * ROWS_MULTIPLE
    delta = torch.empty_like(lse)
    shape = (q.shape[0] * q.shape[1] * num_rows, head_pad(q.shape[3]))
    dq_sum = q.new_empty(shape, dtype=torch.float32)
    keys = plan_keys(
        q, k, v, do, lse, delta, dq_sum, dk, dv, num_rows=num_rows, causal=causal, scale=scale,
        precision=precision(q.dtype), tile=tile,
    )  # fmt: skip
    before = plan_preprocess(o, do, delta, dq_sum, num_rows)
    return [before, keys, plan_postprocess(dq_sum, dq, num_rows, scale)]


def _plan_two_passes(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> list[Launch]:  # fmt: skip
    tiles = tiles_for(q)
    delta = torch.empty_like(lse)
    keys = plan_keys(
        q, k, v, do, lse, delta, None, dk, dv, num_rows=q.shape[2], causal=causal, scale=scale,
        precision=precision(q.dtype), tile=tiles.keys,
    )  # fmt: skip
    queries = plan_queries(
        q, k, v, do, lse, delta, dq, causal=causal, scale=scale, precision=precision(q.dtype),
        tile=tiles.queries,
    )  # fmt: skip
    return [plan_preprocess(o, do, delta, None, q.shape[2]), keys, queries]


def empty_like(tensor: Tensor) -> Tensor:
    """Return memory for a result that is laid out as `tensor`, its last dimension contiguous."""
    result = torch.empty_like(tensor)
    if result.stride(-1) != 1:
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return result


def precision(dtype: torch.dtype) -> str:
    """Return how products are computed: for fp32 as six of bf16, unless torch may use tf32."""
    if dtype != torch.float32 or interpreting():
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "bf16x6"


def _run(tensor: Tensor, *launches: Launch) -> None:
    with _on(tensor.device):
        for launch in launches:
            launch.run()


def _on(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
