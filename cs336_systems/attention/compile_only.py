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
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from cs336_systems.attention.hopper_launch import (
    BACKWARD,
    FORWARD,
    FOUR_GROUPS,
    THREE_GROUPS,
    plan_hopper_backward,
    plan_hopper_forward,
)
from cs336_systems.attention.tiles import ROWS_MULTIPLE, Tile, Tiles, choose, head_pad
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int32: "i32"}
_COMMENT = re.compile(r"/\*.*?\*/")
_JUMP = re.compile(r"\bBRA\S* (?:\S+, )?`\((\.L\w+)\)")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\.\S+ R\d+, R(\d+), gdesc")
_DESTINATION = re.compile(r"(?:@!?U?P\w+ )?([A-Z][\w.]*) (?:P\w+, )?R(\d+)\b")
_STORES = ("ST", "RED", "SYNCS", "BRA", "UTMA")


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    """A thread's; 255 is the most there are."""
    stack_bytes: int
    """A thread's local memory: what did not fit in registers was spilled there."""
    shared_bytes: int
    overwritten: int = 0
    """Products that read, from their second turn on, what something else left in a register."""
    serialized: bool | None = None
    """Whether each product of a warpgroup waits for the one before; asked of Gluon's kernels."""


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
    is_gluon = isinstance(launch.kernel, GluonJITFunction)
    kind = GluonASTSource if is_gluon else ASTSource
    source = kind(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    cubin = compiled.asm["cubin"]
    registers, stack = _resources(cubin)
    overwritten = len(overwritten_operands(_disassemble(cubin)))
    serialized = is_serialized(compiled.asm["ptx"]) if is_gluon else None
    return Usage(registers, stack, compiled.metadata.shared, overwritten, serialized)


def is_serialized(ptx: str) -> bool:
    """Tell whether the assembler has every product of a warpgroup wait for the one before.

    It says so (C7510, C7512, C7514) where registers do not suffice, or where a product is in flight
    from one turn of a loop to the next; Triton hides what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source)]
        done = subprocess.run(
            [*command, "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True, check=True
        )
    return "instructions are serialized" in done.stdout + done.stderr


def overwritten_operands(assembly: str) -> list[str]:
    """Return the products in loops whose left operand is set before the loop and changed in it.

    The assembler that Triton 3.6 brings (ptxas 12.8) makes such code of correct input, where two
    products of a loop have left operands of one size in registers: seen at head dim 64 with tiles
    of 64 x 64. From the loop's second turn on the result is wrong, and nothing says so.
    """
    lines = [line for line in map(str.strip, _COMMENT.sub("", assembly).splitlines()) if line]
    # Behind the exit stands how barriers are waited for, with jumps back into the loops.
    lines = lines[: lines.index("EXIT ;")]
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.startswith(".L")}
    jumps = ((index, _JUMP.search(line)) for index, line in enumerate(lines))
    loops = [
        (labels[found[1]], at) for at, found in jumps if found and labels.get(found[1], at) < at
    ]
    written = [_written(line) for line in lines]
    wrong = []
    for at, line in enumerate(lines):
        around = sorted((stop - start, start, stop) for start, stop in loops if start < at < stop)
        if (product := _PRODUCT.search(line)) is None or not around:
            continue
        operand = set(range(int(product[2]), int(product[2]) + 4))
        for _, start, end in around:  # from the innermost loop outwards, to where it is set
            if any(operand & registers for registers in written[start:at]):
                break
            if any(operand & registers for registers in written[at:end]):
                wrong.append(line)
                break
    return wrong


def _written(line: str) -> set[int]:
    """Return the registers that an instruction writes."""
    found = _DESTINATION.match(line)
    if found is None or found[1].startswith(_STORES):
        return set()
    operation, first = found[1], int(found[2])
    if (product := _PRODUCT.search(line)) is not None:
        number = int(product[1]) // 2
    elif ".128" in operation or operation.endswith(".4"):
        number = 4
    else:
        number = 2 if ".64" in operation or "WIDE" in operation or operation.endswith(".2") else 1
    return set(range(first, first + number))


def _type_of(value: Any) -> str:
    if isinstance(value, HopperDescriptor):
        block = list(value.block_shape)
        return f"tensordesc<{_NAMES[value.base.dtype]}{block},{value.layout!r}>"
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
    printed = _ask(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def _disassemble(cubin: bytes) -> str:
    return _ask(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")


def _ask(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def launches(
    architecture: int,
    dtype: torch.dtype,
    head_dim: int,
    *,
    causal: bool = True,
    length: int = 2048,
    group: int = 1,
    tiles: Tiles | None = None,
) -> Iterator[tuple[str, Tile, Launch]]:
    """Yield every kernel with a tile, the table's unless given, on tensors without memory."""
    batch, heads = 2, 8
    q, o, do, dq = (_meta(batch, heads, length, head_dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (_meta(batch, heads // group, length, head_dim, dtype=dtype) for _ in range(4))
    rows = triton.cdiv(length, ROWS_MULTIPLE) * ROWS_MULTIPLE
    lse, lse2, delta = (_meta(batch, heads, num) for num in (length, rows, rows))
    dq_sum = _meta(batch * heads * rows, head_pad(head_dim))
    tiles = tiles or choose(architecture, dtype, head_pad(head_dim))
    scale = head_dim**-0.5
    how: dict[str, Any] = {"causal": causal, "scale": scale, "precision": precision(dtype)}

    def keys(sums: torch.Tensor | None, tile: Tile) -> Launch:
        return plan_keys(
            q, k, v, do, lse2, delta, sums, dk, dv, **how, tile=tile
        )  # fmt: skip

    for name, tile in (("forward", tiles.forward), ("forward, long", tiles.long_forward)):
        if tile is not None:
            yield name, tile, plan_forward(q, k, v, o, lse, **how, tile=tile)
    small = row_tile(head_dim)
    yield "preprocess", small, plan_preprocess(o, do, lse, lse2, delta, dq_sum)
    if tiles.one_pass is not None:
        yield "backward, one pass", tiles.one_pass, keys(dq_sum, tiles.one_pass)
        yield "postprocess", small, plan_postprocess(dq_sum, dq, rows, scale)
    yield "backward, keys", tiles.keys, keys(None, tiles.keys)
    queries = plan_queries(q, k, v, do, lse2, delta, dq, **how, tile=tiles.queries)
    yield "backward, queries", tiles.queries, queries


def hopper_launches(
    dtype: torch.dtype, head_dim: int, *, causal: bool, length: int = 2048, group: int = 1
) -> Iterator[tuple[str, Launch]]:
    """Yield the Hopper kernels on tensors without memory."""
    batch, heads = 2, 8
    q, o, do = (_meta(batch, heads, length, head_dim, dtype=dtype) for _ in range(3))
    k, v, dk, dv = (_meta(batch, heads // group, length, head_dim, dtype=dtype) for _ in range(4))
    rows = triton.cdiv(length, ROWS_MULTIPLE) * ROWS_MULTIPLE
    lse, lse2, delta = (_meta(batch, heads, num) for num in (length, rows, rows))
    dq_sum = _meta(batch * heads * rows, head_dim)
    how: dict[str, Any] = {"causal": causal, "scale": head_dim**-0.5}
    forward = {"forward": FORWARD[head_dim]}
    if head_dim == 64:
        forward["forward, four groups"] = FOUR_GROUPS
    for name, shape in forward.items():
        yield name, plan_hopper_forward(q, k, v, o, lse, **how, tile=shape)
    kernels = {"backward": BACKWARD[head_dim]}
    if head_dim == 64:
        kernels["backward, three groups"] = THREE_GROUPS
    for name, tile in kernels.items():
        yield (
            name,
            plan_hopper_backward(q, k, v, do, lse2, delta, dq_sum, dk, dv, **how, tile=tile),
        )


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def misfits(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what does not fit its GPU, or spills more than the table of tiles says."""
    for row in rows:
        where = f"sm_{row.architecture} {row.dtype} {row.head_dim} {row.kernel}"
        most = SHARED_BYTES[row.architecture]
        if row.usage.registers < LEAST_REGISTERS:
            yield f"{where} uses {row.usage.registers} registers: the compiler left nothing of it"
        if row.usage.shared_bytes > most:
            yield f"{where} uses {row.usage.shared_bytes} bytes of shared memory, has {most}"
        if row.usage.overwritten:
            yield f"{where} overwrites the operands of {row.usage.overwritten} products it repeats"
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
    parser.add_argument(
        "--hopper", action="store_true", help="the warp-specialised kernels for sm_90 instead"
    )
    args = parser.parse_args(argv)
    if args.hopper:
        print(hopper_table(hopper_rows(), args.format))
        return 0
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


class HopperRow(NamedTuple):
    """One compiled Hopper kernel."""

    kernel: str
    head_dim: int
    mask: str
    inputs: str
    usage: Usage


def hopper_rows() -> list[HopperRow]:
    """Compile the Hopper kernels for bf16."""
    kinds = ((2048, 1, "whole tiles"), (2000, 2, "a tail, grouped"))
    rows = [
        HopperRow(
            kernel, head_dim, "causal" if causal else "full", inputs, compile_launch(launch, 90)
        )
        for head_dim in (64, 128)
        for causal in (False, True)
        for length, group, inputs in kinds
        for kernel, launch in hopper_launches(
            torch.bfloat16, head_dim, causal=causal, length=length, group=group
        )
    ]
    return sorted(rows, key=lambda row: row[:4], reverse=True)


def hopper_table(rows: Sequence[HopperRow], style: str) -> str:
    """Return the rows as a table of one of tabulate's formats."""
    headers = ["kernel", "head dim", "mask", "keys and heads", "spilled bytes", "shared bytes"]
    headers += ["products in flight"]
    lines = [
        [
            *row[:4],
            row.usage.stack_bytes,
            row.usage.shared_bytes,
            "no" if row.usage.serialized else "yes",
        ]
        for row in rows
    ]
    return tabulate(lines, headers=headers, tablefmt=style)


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
            *row.usage[:3],
        ]
        for row in rows
    ]
    return tabulate(lines, headers=headers, tablefmt=style)


if __name__ == "__main__":
    sys.exit(main())
