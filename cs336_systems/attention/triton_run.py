"""From tensors of any leading dimensions to kernels in order: outputs, tiles, launches.

What is launched depends on shapes, strides and settings only, so it is planned once and replayed:
on small inputs planning would take longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cs336_systems.attention import autotune
from cs336_systems.attention.autotune import Planner, Results
from cs336_systems.attention.tiles import ROWS_MULTIPLE, Tile, head_pad, tiles_for
from cs336_systems.attention.triton_launch import (
    ALIGNMENT,
    Launch,
    as_4d,
    loads_in_vectors,
    plan_forward,
    plan_keys,
    plan_postprocess,
    plan_preprocess,
    plan_queries,
)
from cs336_systems.attention.triton_replay import Plan, Replay
from cs336_systems.table import interpreting

MOST_PLANS = 4096
"""Plans kept; inputs of ever new shapes must not fill the memory."""
_MOST_FOLLOWING = 16
"""Backward passes kept with a forward pass: one for each layout that gradients come in."""
Check = Callable[[Tensor, Tensor, Tensor], None]
PORTABLE, HOPPER = "portable", "hopper"
"""Kernels by name."""


_REPLAYS: dict[tuple[Any, ...], Replay] = {}


class Trail(NamedTuple):
    """How the backward pass of a forward pass that was replayed is found without planning."""

    replay: Replay
    places: tuple[Any, ...]
    """Where q, k, v, O and L were."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float,
    check: Check | None = None,
    *,
    kernels: str = PORTABLE,
) -> tuple[Tensor, Tensor, Trail | None]:
    """Return O, L and what `backward` may take. A row that sees no key has O = 0 and L = -inf.

    kernels: PORTABLE, or HOPPER for inputs that `flash_hopper.unfit` has nothing against.
    `check` is called unless inputs of the same shapes, strides and kinds have passed it before.
    """
    key = (
        "forward", kernels, is_causal, scale, precision(q.dtype),
        q.shape, q.stride(), q.dtype, q.device, q.data_ptr() % ALIGNMENT,
        k.shape, k.stride(), k.dtype, k.device, k.data_ptr() % ALIGNMENT,
        v.shape, v.stride(), v.dtype, v.device, v.data_ptr() % ALIGNMENT,
    )  # fmt: skip
    replay = _REPLAYS.get(key)
    if replay is not None:
        o, lse = replay.run((q, k, v))
        return o, lse, Trail(replay, _places(q, k, v, o, lse))
    if check is not None:
        check(q, k, v)
    if k.shape[-2] == 0 or q.numel() == 0:
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
        return empty_like(q).zero_(), lse, None
    plan_for = _plan_hopper_forward if kernels == HOPPER else _plan_forward
    plan = plan_for(as_4d(q), as_4d(k), as_4d(v), is_causal, scale)
    o, lse = _first_run(key, {"q": q, "k": k, "v": v}, plan, (q.shape, q.shape[:-1]))
    return o, lse, None


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
    *,
    kernels: str = PORTABLE,
    trail: Trail | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV; `kernels` as in `forward`, portable ones where it is deterministic.

    trail: from the forward pass, if with these settings and kernels.
    """
    if do.stride(-1) != 1 and do.shape[-1] > 1:
        # The gradient of a sum is one number expanded: no stride of 1 anywhere.
        do = do.contiguous()
    inputs = (do, q, k, v, o, lse)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    followed = None
    after = (deterministic, precision(q.dtype), *_layout(do))
    # Hooks may have put what was saved elsewhere, and laid it out in another way.
    if trail is not None and trail.places == _places(q, k, v, o, lse):
        followed = trail.replay.after
        if (replay := followed.get(after)) is not None:
            dq, dk, dv, *_ = replay.run(inputs)
            return dq, dk, dv
    if deterministic:
        kernels = PORTABLE
    key = (
        "backward", kernels, is_causal, scale, precision(q.dtype), deterministic,
        *(part for tensor in inputs for part in _layout(tensor)),
    )  # fmt: skip
    replay = _REPLAYS.get(key)
    if replay is not None:
        if followed is not None and len(followed) < _MOST_FOLLOWING:
            followed[after] = replay
        dq, dk, dv, *_ = replay.run(inputs)
        return dq, dk, dv
    if k.shape[-2] == 0 or q.numel() == 0:
        dq, dk, dv = (empty_like(tensor).zero_() for tensor in (q, k, v))
        return dq, dk, dv
    views = [as_4d(tensor) for tensor in (do, q, k, v, o)]
    if kernels == HOPPER:
        plan = _plan_hopper_backward(views, lse, is_causal, scale)
    else:
        plan = _plan_backward(views, lse, is_causal, scale, deterministic)
    named = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    dq, dk, dv, *_ = _first_run(key, named, plan, (q.shape, k.shape, v.shape))
    return dq, dk, dv


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """View a tensor in a shape; without one it already has, which takes longer than a kernel."""
    return tensor if tensor.shape == shape else tensor.view(shape)


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


def _plan_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Plan:
    def launch(made: Results, tile: Tile) -> Launch:
        return plan_forward(
            q, k, v, made["o"], made["lse"], causal=causal, scale=scale,
            precision=precision(q.dtype), tile=tile,
        )  # fmt: skip

    made = {"o": empty_like(q), "lse": q.new_empty(q.shape[:-1], dtype=torch.float32)}
    tile = _tile("forward", tiles_for(q).forward_for(k.shape[2], causal), made, launch)
    return Plan([launch(made, tile)], {"q": q, "k": k, "v": v}, made)


def _plan_backward(
    views: list[Tensor], lse: Tensor, causal: bool, scale: float, deterministic: bool
) -> Plan:
    do, q, k, v, o = views
    tiles = tiles_for(q)
    made = {"dq": empty_like(q), "dk": empty_like(k), "dv": empty_like(v)}
    num_rows = triton.cdiv(q.shape[2], ROWS_MULTIPLE) * ROWS_MULTIPLE
    for name in ("lse2", "delta"):
        made[name] = q.new_empty((*q.shape[:2], num_rows), dtype=torch.float32)
    how: dict[str, Any] = {"causal": causal, "scale": scale, "precision": precision(q.dtype)}
    one_pass = None if deterministic else tiles.one_pass
    if not (loads_in_vectors(q) and loads_in_vectors(do)):
        # Triton 3.6 compiles the one-pass kernel wrong where it cannot pipeline these loads: with
        # 32 queries to a tile it accesses illegal memory.
        one_pass = None
    if one_pass is not None:
        shape = (q.shape[0] * q.shape[1] * num_rows, head_pad(q.shape[3]))
        made["dq_sum"] = q.new_empty(shape, dtype=torch.float32)

    def preprocess(made: Results) -> Launch:
        return plan_preprocess(o, do, lse, made["lse2"], made["delta"], made.get("dq_sum"))

    def keys(made: Results, tile: Tile) -> Launch:
        return plan_keys(
            q, k, v, do, made["lse2"], made["delta"], made.get("dq_sum"), made["dk"], made["dv"],
            **how, tile=tile,
        )  # fmt: skip

    def queries(made: Results, tile: Tile) -> Launch:
        return plan_queries(q, k, v, do, made["lse2"], made["delta"], made["dq"], **how, tile=tile)

    if one_pass is not None:
        tile = _tile("one_pass", one_pass, made, keys, preprocess)
        last = plan_postprocess(made["dq_sum"], made["dq"], num_rows, scale)
    else:
        tile = _tile("keys", tiles.keys, made, keys, preprocess)
        last = queries(made, _tile("queries", tiles.queries, made, queries, preprocess))
    launches = [preprocess(made), keys(made, tile), last]
    return Plan(launches, {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}, made)


def _plan_hopper_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Plan:
    from cs336_systems.attention.hopper_launch import loadable, plan_hopper_forward

    q, k, v = loadable(q), loadable(k), loadable(v)
    made = {"o": empty_like(q), "lse": q.new_empty(q.shape[:-1], dtype=torch.float32)}
    launch = plan_hopper_forward(q, k, v, made["o"], made["lse"], causal=causal, scale=scale)
    return Plan([launch], {"q": q, "k": k, "v": v}, made)


def _plan_hopper_backward(views: list[Tensor], lse: Tensor, causal: bool, scale: float) -> Plan:
    from cs336_systems.attention.hopper_launch import loadable, plan_hopper_backward

    do, q, k, v, o = (loadable(tensor) for tensor in views)
    made = {"dq": empty_like(q), "dk": empty_like(k), "dv": empty_like(v)}
    rows = triton.cdiv(q.shape[2], ROWS_MULTIPLE) * ROWS_MULTIPLE
    for name in ("lse2", "delta"):
        made[name] = q.new_empty((*q.shape[:2], rows), dtype=torch.float32)
    shape = (q.shape[0] * q.shape[1] * rows, q.shape[3])
    made["dq_sum"] = q.new_empty(shape, dtype=torch.float32)
    launches = [
        plan_preprocess(
            o, do, lse, made["lse2"], made["delta"], made["dq_sum"], fragments=True
        ),
        plan_hopper_backward(
            q, k, v, do, made["lse2"], made["delta"], made["dq_sum"], made["dk"], made["dv"],
            causal=causal, scale=scale,
        ),
        plan_postprocess(made["dq_sum"], made["dq"], rows, scale, fragments=True),
    ]  # fmt: skip
    return Plan(launches, {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}, made)


def _tile(
    kernel: str, table: Tile, made: Results, plan: Planner,
    prepare: Callable[[Results], Launch] | None = None,
) -> Tile:  # fmt: skip
    """Return the table's tile, or the one that was measured where that is asked for."""
    if (tuner := autotune.tuner()) is None:
        return table
    with _on(next(iter(made.values())).device):
        return tuner.tile(kernel, table, made, plan, prepare)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return all of a tensor that a plan depends on."""
    return (
        tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % ALIGNMENT
    )  # fmt: skip


def _places(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple([(tensor.data_ptr(), tensor.stride()) for tensor in tensors])


def _first_run(
    key: tuple[Any, ...],
    inputs: Mapping[str, Tensor],
    plan: Plan,
    shapes: Sequence[torch.Size],
) -> list[Tensor]:
    """Run a plan and keep it, unless it worked on copies of its inputs; return results, the first
    ones in these shapes."""
    with _on(inputs["q"].device):
        replay = plan.run(shapes)
    in_place = all(plan.inputs[name].data_ptr() == inputs[name].data_ptr() for name in inputs)
    if replay is not None and in_place:
        if len(_REPLAYS) >= MOST_PLANS:
            _REPLAYS.clear()
        _REPLAYS[key] = replay
    return [_shaped(*each) for each in zip(plan.results.values(), shapes, strict=False)]


def _on(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
