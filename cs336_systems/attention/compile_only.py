"""Compiling the Triton attention kernels for a GPU that is not here, and what they would use of it.

`python -m cs336_systems.attention.compile_only` prints the table of every tile in `tiles`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from cs336_systems.attention.tiles import ROWS_MULTIPLE, Tile, choose, head_pad
from cs336_systems.attention.triton_launch import (
    Launch,
    plan_forward,
    plan_keys,
    plan_postprocess,
    plan_preprocess,
    plan_queries,
    row_tile,
)
from cs336_systems.attention.triton_run import precision

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one program may use, by architecture."""
LEAST_REGISTERS = 16
"""Of a kernel that does anything."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHAPE = (2, 8, 2048)


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    """A thread's; 255 is the most there are."""
    stack_bytes: int
    """A thread's local memory: what did not fit in registers was spilled there."""
    shared_bytes: int


class Row(NamedTuple):
    """One kernel of the table."""

    architecture: int
    dtype: str
    head_dim: int
    kernel: str
    tile: Tile
    usage: Usage


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compile a launch for sm_NN with Triton's own compiler and assembler; no GPU is needed."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        signature[name] = "constexpr" if parameter.is_constexpr else _type_of(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared)


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value == 1:  # As at a launch, an argument of 1 is compiled in.
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return int(found[1]), int(found[2])


def launches(
    architecture: int, dtype: torch.dtype, head_dim: int, *, causal: bool = True
) -> Iterator[tuple[str, Tile, Launch]]:
    """Yield every kernel with the table's tile for it, on tensors without memory."""
    q, k, v, o, do, dq, dk, dv = (
        torch.empty(*_SHAPE, head_dim, dtype=dtype, device="meta") for _ in range(8)
    )
    lse, delta = (torch.empty(_SHAPE, device="meta") for _ in range(2))
    batch, heads, rows = _SHAPE
    assert rows % ROWS_MULTIPLE == 0
    dq_sum = torch.empty(batch * heads * rows, head_pad(head_dim), device="meta")
    tiles = choose(architecture, dtype, head_pad(head_dim))
    scale = head_dim**-0.5
    how: dict[str, Any] = {"causal": causal, "scale": scale, "precision": precision(dtype)}

    def keys(sums: torch.Tensor | None, tile: Tile) -> Launch:
        return plan_keys(
            q, k, v, do, lse, delta, sums, dk, dv, num_rows=rows, **how, tile=tile
        )  # fmt: skip

    for name, tile in (("forward", tiles.forward), ("forward, long", tiles.long_forward)):
        if tile is not None:
            yield name, tile, plan_forward(q, k, v, o, lse, **how, tile=tile)
    small = row_tile(head_dim)
    yield "preprocess", small, plan_preprocess(o, do, delta, dq_sum, rows)
    if tiles.one_pass is not None:
        yield "backward, one pass", tiles.one_pass, keys(dq_sum, tiles.one_pass)
        yield "postprocess", small, plan_postprocess(dq_sum, dq, rows, scale)
    yield "backward, keys", tiles.keys, keys(None, tiles.keys)
    queries = plan_queries(q, k, v, do, lse, delta, dq, **how, tile=tiles.queries)
    yield "backward, queries", tiles.queries, queries


def misfits(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what does not fit its GPU, or spills more than the table of tiles says."""
    for row in rows:
        where = f"sm_{row.architecture} {row.dtype} {row.head_dim} {row.kernel}"
        most = SHARED_BYTES[row.architecture]
        if row.usage.registers < LEAST_REGISTERS:
            yield f"{where} uses {row.usage.registers} registers: the compiler left nothing of it"
        if row.usage.shared_bytes > most:
            yield f"{where} uses {row.usage.shared_bytes} bytes of shared memory, has {most}"
        if row.usage.stack_bytes > row.tile.spilled_bytes:
            known = row.tile.spilled_bytes
            yield f"{where} spills {row.usage.stack_bytes} bytes, {known} known"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel does not fit."""
    parser = argparse.ArgumentParser(prog="compile_only", description=__doc__)
    parser.add_argument("--architectures", default="80,90,100", help="sm_NN, comma-separated")
    parser.add_argument("--dtypes", default="bf16,fp32", help=", ".join(DTYPES))
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)))
    parser.add_argument("--format", default="simple", help="a format of tabulate, e.g. github")
    args = parser.parse_args(argv)
    jobs = [
        (int(architecture), dtype, int(head_dim), *planned)
        for architecture in args.architectures.split(",")
        for dtype in args.dtypes.split(",")
        for head_dim in args.head_dims.split(",")
        for planned in launches(int(architecture), DTYPES[dtype], int(head_dim))
    ]
    rows = [
        Row(architecture, dtype, head_dim, kernel, tile, compile_launch(launch, architecture))
        for architecture, dtype, head_dim, kernel, tile, launch in tqdm(jobs, unit="kernel")
    ]
    print(_table(rows, args.format))
    found = list(misfits(rows))
    for line in found:
        print(f"compile_only: {line}", file=sys.stderr)
    return 1 if found else 0


def _table(rows: Sequence[Row], style: str) -> str:
    headers = ["architecture", "dtype", "head dim", "kernel", "tile", "warps", "stages", "TMA"]
    headers += ["registers", "spilled bytes", "shared bytes"]
    lines = [
        [
            f"sm_{row.architecture}",
            *row[1:4],
            f"{row.tile.block_m} x {row.tile.block_n}",
            row.tile.num_warps,
            row.tile.num_stages,
            "yes" if row.tile.tma else "no",
            *row.usage,
        ]
        for row in rows
    ]
    return tabulate(lines, headers=headers, tablefmt=style)


if __name__ == "__main__":
    sys.exit(main())
