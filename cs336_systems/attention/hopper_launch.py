"""Which inputs the Hopper kernels take, and their launches from tensors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language import bfloat16 as gluon_bfloat16
from triton.experimental.gluon.language import float16 as gluon_float16
from triton.experimental.gluon.language import float32 as gluon_float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cs336_systems.attention.hopper_backward import KEYS as _KEYS
from cs336_systems.attention.hopper_backward import backward_kernel
from cs336_systems.attention.hopper_backward_three import backward_kernel as kernel_of_three
from cs336_systems.attention.hopper_common import ROWS
from cs336_systems.attention.hopper_forward import forward_kernel
from cs336_systems.attention.hopper_schedule import Work, schedule
from cs336_systems.attention.triton_launch import Launch, fits_tma

GROUP_ROWS = ROWS.value
KEYS = _KEYS.value
"""Keys of an item of the backward pass with two groups."""
_DTYPES = {
    torch.bfloat16: gluon_bfloat16,
    torch.float16: gluon_float16,
    torch.float32: gluon_float32,
}
# As many warps as a partition's; the others' are in the kernels.
_OPTIONS = {"num_warps": 4}
_DQ_BOX = [128, 32]


@dataclass(frozen=True, kw_only=True)
class ForwardTile:
    """How the forward kernel is divided."""

    num_groups: int
    """Warpgroups of 64 queries each."""
    block_n: int
    num_stages: int
    """Tiles of K, and of V, on their way or in use. With more than two, K's and V's slots come back
    together."""
    ping_pong: bool
    """Whether groups take turns with the tensor cores."""
    persistent: bool
    """Whether there are no more programs than multiprocessors, each with many items of work."""
    threes: bool
    """Whether maxima are looked for as integers, three numbers at a time."""
    early: bool
    """Whether O is multiplied before the exponentials, for which the last P V has to be done."""
    hold: bool
    """Whether Q is held in registers."""


@dataclass(frozen=True, kw_only=True)
class BackwardTile:
    """What the backward kernel holds where."""

    num_stages: int
    """Tiles of Q and of dO on their way or in use."""
    hold_k: bool
    """Whether K is held in registers."""
    hold_v: bool
    """Whether V is."""
    persistent: bool
    """As ForwardTile's."""
    num_groups: int = 2
    """Warpgroups of 64 keys each. Three, at head dim 64, are another kernel; it holds V alone."""


FORWARD = {
    64: ForwardTile(
        num_groups=3,
        block_n=128,
        num_stages=2,
        ping_pong=True,
        persistent=True,
        threes=True,
        early=True,
        hold=False,
    ),
    128: ForwardTile(
        num_groups=2,
        block_n=128,
        num_stages=2,
        ping_pong=True,
        persistent=True,
        threes=True,
        early=False,
        hold=True,
    ),
}
"""By head dim, as BACKWARD."""
BACKWARD = {
    64: BackwardTile(num_stages=4, hold_k=True, hold_v=True, persistent=True),
    128: BackwardTile(num_stages=2, hold_k=False, hold_v=True, persistent=True),
}


FOUR_GROUPS = replace(FORWARD[64], num_groups=4, block_n=64, num_stages=3)
FOUR_GROUPS_QUERIES = 8192
"""Up to how many queries under a causal mask four groups are faster, whose tiles of 64 keys leave
less to be masked; more instructions for each score."""


def forward_tile(head_dim: int, num_queries: int, *, causal: bool) -> ForwardTile:
    """Return the tile for so many queries."""
    if head_dim == 64 and causal and num_queries <= FOUR_GROUPS_QUERIES:
        return FOUR_GROUPS
    return FORWARD[head_dim]


THREE_GROUPS = BackwardTile(num_stages=3, hold_k=False, hold_v=True, persistent=True, num_groups=3)
THREE_GROUPS_KEYS = {True: 8192, False: 2048}
"""By whether the mask is causal: from how many keys on three groups are faster. Fewer tiles of 192
keys are dealt out less evenly, and more of one is masked."""


def backward_tile(head_dim: int, num_keys: int, *, causal: bool) -> BackwardTile:
    """Return the tile for so many keys."""
    if head_dim == 64 and num_keys >= THREE_GROUPS_KEYS[causal]:
        return THREE_GROUPS
    return BACKWARD[head_dim]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return those of a GPU, or an H200's where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _schedule(
    work: Work, tile: ForwardTile | BackwardTile, device: torch.device
) -> tuple[int, Tensor]:
    """Return how many programs there are, and their items."""
    at_once = num_multiprocessors(device)
    num_programs = min(work.num_items, at_once) if tile.persistent else work.num_items
    return num_programs, schedule(work, num_programs, at_once, device)


def loadable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if the accelerator cannot load it where it is."""
    if fits_tma(tensor):
        return tensor
    copy = tensor.contiguous()
    return copy if fits_tma(copy) else tensor.clone(memory_format=torch.contiguous_format)


def plan_hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, causal: bool, scale: float,
    tile: ForwardTile | None = None,
) -> Launch:  # fmt: skip
    """Return the launch that fills O and L; tensors are four-dimensional, scale positive."""
    batch, num_heads, num_queries, head_dim = q.shape
    tile = tile or forward_tile(head_dim, num_queries, causal=causal)
    rows = tile.num_groups * GROUP_ROWS
    num_tiles = triton.cdiv(num_queries, rows)
    num_keys, group = k.shape[2], num_heads // k.shape[1]
    stops = ((at + 1) * rows if causal else num_keys for at in range(num_tiles))
    work = Work(
        batch=batch,
        num_heads=num_heads,
        together=group,
        costs=tuple(min(stop, num_keys) for stop in stops),
    )
    num_programs, items = _schedule(work, tile, q.device)
    arguments = {
        "q": _describe(q, GROUP_ROWS),
        "k": _describe(k, tile.block_n),
        "v": _describe(v, tile.block_n),
        "o": _describe(o, GROUP_ROWS),
        "lse_ptr": lse,
        "items_ptr": items,
        "num_heads": num_heads,
        "num_queries": num_queries,
        "num_keys": num_keys,
        "qk_scale": scale * math.log2(math.e),
        "GROUP": group,
        "NUM_GROUPS": tile.num_groups,
        "STAGES": tile.num_stages,
        "CAUSAL": causal,
        "KEY_TAIL": num_keys % tile.block_n != 0,
        "PING_PONG": tile.ping_pong,
        "THREES": tile.threes,
        "EARLY": tile.early,
        "HOLD": tile.hold,
    }
    return Launch(
        kernel=forward_kernel,
        num_programs=num_programs,
        arguments=arguments,
        options=_OPTIONS,
        constants=("items_ptr",),
    )


def plan_hopper_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse2: Tensor, delta: Tensor, dq_sum: Tensor,
    dk: Tensor, dv: Tensor, *, causal: bool, scale: float, tile: BackwardTile | None = None,
) -> Launch:  # fmt: skip
    """Return the launch that computes dK and dV, and adds up dQ in its buffer.

    The buffer is in fragment order: after each other 64 rows x 64 columns, as a warpgroup's threads
    hold them. Of an element's row the bits are (warp 2, half 1, row 3) and of its column (block 3,
    lane 2, element 1); in memory they are block, warp, row, lane, half, element.
    """
    batch, num_kv_heads, num_keys, head_dim = k.shape
    tile = tile or backward_tile(head_dim, num_keys, causal=causal)
    is_pair = tile.num_groups == 2
    keys = GROUP_ROWS * tile.num_groups
    num_tiles = triton.cdiv(num_keys, keys)
    group = q.shape[1] // num_kv_heads
    num_rows = delta.shape[2]
    least = KEYS if is_pair else GROUP_ROWS
    starts = (min(at * keys, num_rows - least) if causal else 0 for at in range(num_tiles))
    work = Work(
        batch=batch,
        num_heads=num_kv_heads,
        together=1,
        costs=tuple(group * (num_rows - start) for start in starts),
    )
    num_programs, items = _schedule(work, tile, q.device)
    dq_shape = [dq_sum.numel() // _DQ_BOX[1], _DQ_BOX[1]]
    arguments = {
        "q": _describe(q, GROUP_ROWS),
        "k": _describe(k, keys if is_pair else GROUP_ROWS),
        "v": _describe(v, GROUP_ROWS),
        "do": _describe(do, GROUP_ROWS),
        "lse2": _describe_rows(lse2),
        "delta": _describe_rows(delta),
        "dq": TensorDescriptor(
            dq_sum, dq_shape, [_DQ_BOX[1], 1], _DQ_BOX, _layout(_DQ_BOX, torch.float32)
        ),
        "dk": _describe(dk, GROUP_ROWS),
        "dv": _describe(dv, GROUP_ROWS),
        "items_ptr": items,
        "num_heads": q.shape[1],
        "num_queries_padded": num_rows,
        "num_keys": num_keys,
        "qk_scale": scale * math.log2(math.e),
        "scale": scale,
        "GROUP": group,
        **_constants(tile),
        "CAUSAL": causal,
        "KEY_TAIL": num_keys % keys != 0,
    }
    return Launch(
        kernel=backward_kernel if is_pair else kernel_of_three,
        num_programs=num_programs,
        arguments=arguments,
        options=_OPTIONS,
        constants=("items_ptr",),
    )


def _constants(tile: BackwardTile) -> dict[str, int | bool]:
    """Return what a tile sets in its kernel."""
    if tile.num_groups == 3:
        return {"STAGES": tile.num_stages}
    return {
        "STAGES": tile.num_stages,
        "HOLD_K": tile.hold_k,
        "HOLD_V": tile.hold_v,
    }


def _layout(block: list[int], dtype: torch.dtype) -> Any:
    return NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])


def _describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Describe a (batch, heads, rows, head_dim) tensor of which `rows` rows are moved at a time."""
    block = [1, 1, rows, tensor.shape[3]]
    # The stride of a dimension of one is never used, but the descriptor checks it.
    strides = [s if n > 1 else 64 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides[:-1], 1], block, _layout(block, tensor.dtype)
    )


def _describe_rows(tensor: Tensor) -> TensorDescriptor:
    """Describe a contiguous tensor of one number a row, of which 64 are moved at a time."""
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(tensor, [tensor.numel()], [1], [GROUP_ROWS], layout)
