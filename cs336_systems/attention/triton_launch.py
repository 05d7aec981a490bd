"""Launching the Triton attention kernels: views, strides, descriptors, grids.

A `Launch` is a kernel with everything it is called with, so that the same arguments can be run,
timed, or compiled for a GPU that is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cs336_systems.attention.tiles import Tile, head_pad
from cs336_systems.attention.triton_backward import (
    keys_kernel,
    postprocess_kernel,
    preprocess_kernel,
    queries_kernel,
)
from cs336_systems.attention.triton_forward import forward_kernel

SECTION_BYTES = 4 * 2**20
"""What a section of heads may read again and again: a small part of recent GPUs' L2, through which
gradients and outputs pass as well."""
_LEAST_SECTION = 2
_ROW_TILE_ELEMENTS = 64 * 128
ALIGNMENT = 16
"""Bytes: what kernels are compiled to know, or not, of an address."""
TMA_FLOPS = 2e9
"""Below it, describing tensors to the accelerator costs more host time than it saves."""
LEAST_SCALE = 1e-30
_WIDE = 2**31


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel, ready to go."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    """Names of tensors that are the same for all inputs of these shapes."""

    def run(self) -> Any:
        """Queue the kernel; return it compiled, or None in Triton's interpreter."""
        return self.kernel[(self.num_programs,)](**self.arguments, **self.options)


def as_4d(tensor: Tensor) -> Tensor:
    """Return a view (batch, heads, rows, head_dim)."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    if tensor.dim() == 2:
        return tensor[None, None]
    return tensor.reshape(-1, *tensor.shape[-3:])


def fits_tma(tensor: Tensor) -> bool:
    """Tell whether a (batch, heads, rows, head_dim) tensor can be loaded by the accelerator."""
    size = tensor.element_size()
    strides = (s for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1)
    return tensor.data_ptr() % ALIGNMENT == 0 and all(
        s > 0 and s * size % ALIGNMENT == 0 for s in strides
    )


def loads_in_vectors(tensor: Tensor) -> bool:
    """Tell whether rows begin and end on whole 16 bytes, so that pointers load asynchronously."""
    return fits_tma(tensor) and tensor.shape[-1] * tensor.element_size() % ALIGNMENT == 0


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, causal: bool, scale: float,
    precision: str, tile: Tile,
) -> Launch:  # fmt: skip
    """Return the launch that fills O and L; tensors are four-dimensional."""
    batch, num_heads, num_queries, _ = q.shape
    num_tiles = triton.cdiv(num_queries, tile.block_m)
    arguments = {
        **_products(tile, causal, precision, q=q, k=k, v=v),
        "o_ptr": o,
        "lse_ptr": lse,
        **_strides(qm=q, kn=k, vn=v, om=o),
        "num_heads": num_heads,
        "num_batch_heads": batch * num_heads,
        "num_tiles": num_tiles,
        "section": section(k, num_heads // k.shape[1]),
        # Not 0, which would make NaN of a masked score's -inf.
        "qk_scale": max(abs(scale) * math.log2(math.e), LEAST_SCALE),
        "NEGATE": scale < 0,
        "WIDE": _wide(tile, q, k, v, o),
    }
    return _launch(forward_kernel, num_tiles * batch * num_heads, arguments, tile)


def plan_preprocess(
    o: Tensor, do: Tensor, lse: Tensor, lse2: Tensor, delta: Tensor, dq_sum: Tensor | None,
    *, fragments: bool = False,
) -> Launch:  # fmt: skip
    """Return the launch that computes D, and L in base 2, and clears the dQ buffer.

    fragments: D and L are in the order of `hopper_common.load_columns`.
    Shapes: lse2 and delta are (batch, heads, padded rows), the buffer has as many rows in all.
    """
    batch, num_heads, num_queries, head_dim = o.shape
    tile = row_tile(head_dim)
    num_tiles = triton.cdiv(delta.shape[2], tile.block_m)
    arguments = {
        "o_ptr": o,
        "do_ptr": do,
        "lse_ptr": lse,
        "lse2_ptr": lse2,
        "delta_ptr": delta,
        "dq_sum_ptr": delta if dq_sum is None else dq_sum,
        **_strides(om=o, dom=do),
        "num_heads": num_heads,
        "num_queries": num_queries,
        "num_queries_padded": delta.shape[2],
        "num_tiles": num_tiles,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": head_pad(head_dim),
        "BLOCK_M": tile.block_m,
        "CLEAR": dq_sum is not None,
        "WIDE": _wide(tile, o, do),
        "FRAGMENTS": fragments,
    }
    return _launch(preprocess_kernel, num_tiles * batch * num_heads, arguments, tile)


def plan_postprocess(
    dq_sum: Tensor, dq: Tensor, num_rows: int, scale: float, *, fragments: bool = False
) -> Launch:
    """Return the launch that rounds the dQ buffer into dQ.

    fragments: the buffer is as `plan_hopper_backward` says, and num_rows a multiple of 64.
    """
    batch, num_heads, num_queries, head_dim = dq.shape
    tile = row_tile(head_dim)
    num_tiles = triton.cdiv(num_queries, tile.block_m)
    arguments = {
        "dq_sum_ptr": dq_sum,
        "dq_ptr": dq,
        **_strides(dqm=dq),
        "num_heads": num_heads,
        "num_queries": num_queries,
        "num_queries_padded": num_rows,
        "num_tiles": num_tiles,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": head_pad(head_dim),
        "BLOCK_M": tile.block_m,
        "WIDE": _wide(tile, dq),
        "FRAGMENTS": fragments,
    }
    return _launch(postprocess_kernel, num_tiles * batch * num_heads, arguments, tile)


def plan_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse2: Tensor, delta: Tensor,
    dq_sum: Tensor | None, dk: Tensor, dv: Tensor, *, causal: bool, scale: float,
    precision: str, tile: Tile,
) -> Launch:  # fmt: skip
    """Return the launch that computes dK and dV, and adds up dQ where there is a buffer for it."""
    batch, num_kv_heads, num_keys, head_dim = k.shape
    num_queries = q.shape[2]
    num_tiles = triton.cdiv(num_keys, tile.block_n)
    # A query that sees only keys before it sees none past the last.
    key_tail = num_keys % tile.block_n != 0 and not (causal and num_queries <= num_keys)
    products = _products(tile, causal, precision, q=q, k=k, v=v, do=do)
    sums: Any = delta if dq_sum is None else dq_sum
    if products["TMA"] and dq_sum is not None:
        rows, pad = delta.numel(), head_pad(head_dim)
        sums = TensorDescriptor(sums, [rows, pad], [pad, 1], [tile.block_m, pad])
    arguments = {
        **products,
        "lse2_ptr": lse2,
        "delta_ptr": delta,
        "dq_sum": sums,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **_strides(qm=q, kn=k, vn=v, dom=do, dkn=dk, dvn=dv),
        "num_kv_heads": num_kv_heads,
        "num_batch_heads": batch * num_kv_heads,
        "num_queries_padded": delta.shape[2],
        "num_tiles": num_tiles,
        "section": section(q, 1),
        "scale": scale,
        "qk_scale": scale * math.log2(math.e),
        "KEY_TAIL": key_tail,
        "ADD_DQ": dq_sum is not None,
        # With both masks in the loop registers run out.
        "HOLD": tile.hold and products["TMA"] and not (causal and key_tail),
        "WIDE": _wide(tile, q, k, v, do, dk, dv),
    }
    return _launch(keys_kernel, num_tiles * batch * num_kv_heads, arguments, tile)


def plan_queries(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse2: Tensor, delta: Tensor, dq: Tensor, *,
    causal: bool, scale: float, precision: str, tile: Tile,
) -> Launch:  # fmt: skip
    """Return the launch that computes dQ by itself."""
    batch, num_heads, num_queries, _ = q.shape
    num_tiles = triton.cdiv(num_queries, tile.block_m)
    products = _products(tile, causal, precision, q=q, k=k, v=v, do=do)
    arguments = {
        **products,
        "lse2_ptr": lse2,
        "delta_ptr": delta,
        "dq_ptr": dq,
        **_strides(qm=q, kn=k, vn=v, dom=do, dqm=dq),
        "num_heads": num_heads,
        "num_batch_heads": batch * num_heads,
        "num_queries_padded": delta.shape[2],
        "num_tiles": num_tiles,
        "section": section(k, num_heads // k.shape[1]),
        "scale": scale,
        "qk_scale": scale * math.log2(math.e),
        "HOLD": tile.hold and products["TMA"],
        "WIDE": _wide(tile, q, k, v, do, dq),
    }
    return _launch(queries_kernel, num_tiles * batch * num_heads, arguments, tile)


def row_tile(head_dim: int) -> Tile:
    """Return the tile of the kernels before and after, which multiply nothing."""
    rows = min(64, _ROW_TILE_ELEMENTS // head_pad(head_dim))
    return Tile(block_m=rows, block_n=16, num_warps=4, num_stages=1)


def _products(tile: Tile, causal: bool, precision: str, **tensors: Tensor) -> dict[str, Any]:
    """Return the arguments of every kernel that multiplies tiles of q, k, v and perhaps do."""
    q, k = tensors["q"], tensors["k"]
    num_keys, pad = k.shape[2], head_pad(q.shape[3])
    enough = 4 * q.numel() * num_keys >= TMA_FLOPS
    tma = tile.tma and enough and all(fits_tma(tensor) for tensor in tensors.values())
    rows = {"q": tile.block_m, "do": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    return {
        **{name: _source(tensor, rows[name], pad, tma) for name, tensor in tensors.items()},
        "num_queries": q.shape[2],
        "num_keys": num_keys,
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[3],
        "HEAD_PAD": pad,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "KEY_TAIL": num_keys % tile.block_n != 0,
        "PRECISION": precision,
        "TMA": tma,
    }


def _launch(kernel: Any, num_programs: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.most_registers is not None:
        options["maxnreg"] = tile.most_registers
    return Launch(kernel=kernel, num_programs=num_programs, arguments=arguments, options=options)


def _source(tensor: Tensor, rows: int, pad: int, tma: bool) -> Any:
    if not tma:
        return tensor
    # The stride of a dimension of one is never used, but the descriptor checks it.
    strides = [s if n > 1 else 64 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, pad])


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return strides by argument name: `qm=q` gives stride_qb, stride_qh and stride_qm."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        batch, head, row, _ = tensor.stride()
        found |= {
            f"stride_{name[:-1]}b": batch,
            f"stride_{name[:-1]}h": head,
            f"stride_{name}": row,
        }
    return found


def section(shared: Tensor, group: int) -> int:
    """Return how many heads work on tiles together: those whose two shared tensors stay in L2."""
    head_bytes = 2 * shared.shape[2] * shared.shape[3] * shared.element_size()
    return group * max(_LEAST_SECTION, SECTION_BYTES // max(1, head_bytes))


def _wide(tile: Tile, *tensors: Tensor) -> bool:
    rows = max(tile.block_m, tile.block_n)
    return any(abs(tensor.stride(2)) * rows >= _WIDE for tensor in tensors)
