"""Memory, messages and device counts on paper: `python -m cs336_systems.parallel.accounting`.

Prints, as Markdown tables, what the models beside this file give for chosen sizes: `memory_model`,
`bucket_model`, `ring_model`, `ffn_model` and `scale_model`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from cs336_systems.config import PRESETS, preset
from cs336_systems.errors import UsageError
from cs336_systems.parallel import ffn_model
from cs336_systems.parallel.bucket_model import Gradients
from cs336_systems.parallel.ffn_model import Device, Layer, Passes
from cs336_systems.parallel.memory_model import (
    FP32_BYTES,
    MODELLED,
    Setting,
    Weights,
    rank_bytes,
)
from cs336_systems.parallel.ring_model import ALL_REDUCES, all_reduce
from cs336_systems.parallel.scale_model import LOWER_THE_BATCH, Mesh, Stack

GIB = 2**30
MIB = 2**20


def memory_table(arguments: argparse.Namespace) -> str:
    """Return what each strategy holds on a rank."""
    setting = Setting(
        weights=Weights.of(preset(arguments.size)),
        world_size=arguments.world_size,
        communication_bytes=arguments.communication_bytes,
        compute_bytes=arguments.compute_bytes,
    )
    names = ("parameters", "gradients", "optimizer_state", "communication", "held", "transient")
    rows = []
    for strategy in MODELLED:
        found = rank_bytes(strategy, setting)
        rows.append([strategy, *(getattr(found, name) / GIB for name in names)])
    title = f"Memory of {arguments.size} on each of {arguments.world_size} ranks, AdamW (GiB)"
    return _table(title, ("strategy", *(name.replace("_", " ") for name in names)), rows)


def bucket_table(arguments: argparse.Namespace) -> str:
    """Return the time that buckets of several sizes leave exposed."""
    num_bytes = FP32_BYTES * Weights.of(preset(arguments.size)).total
    gradients = Gradients(
        num_bytes=num_bytes,
        bytes_per_s=arguments.bandwidth,
        call_seconds=arguments.call_seconds,
    )
    sizes = [*(megabytes * MIB for megabytes in (1, 10, 25, 100, 1000)), num_bytes]
    counts = {max(round(num_bytes / size), 1) for size in sizes} | {gradients.best_num_buckets}
    rows = [
        [count, num_bytes / count / MIB, gradients.exposed_seconds(count) * 1e3]
        for count in sorted(counts, reverse=True)
    ]
    title = f"Exposed communication of {arguments.size}'s gradients, in buckets"
    best = (
        f"Best: {gradients.best_num_buckets} buckets; sqrt(s w o) = "
        f"{gradients.best_bucket_bytes / MIB:.4g} MiB."
    )
    return f"{_table(title, ('buckets', 'bucket (MiB)', 'exposed (ms)'), rows)}\n\n{best}"


def ring_table(arguments: argparse.Namespace) -> str:
    """Return what ways to all-reduce the gradients cost."""
    num_bytes = FP32_BYTES * Weights.of(preset(arguments.size)).total
    rows = []
    for way in ALL_REDUCES:
        found = all_reduce(way, num_bytes, arguments.world_size)
        seconds = found.seconds(arguments.bandwidth, arguments.call_seconds)
        rows.append([way, found.num_steps, found.num_bytes / GIB, seconds * 1e3])
    title = f"All-reduce of {arguments.size}'s gradients between {arguments.world_size} ranks"
    return _table(title, ("way", "steps", "link carries (GiB)", "time (ms)"), rows)


def ffn_table(arguments: argparse.Namespace) -> str:
    """Return the passes of a gated feed-forward layer, and how many devices stay busy."""
    layer, device, num = Layer(num_tokens=arguments.tokens), Device(), arguments.world_size
    rows = [
        [name, *_milliseconds(passes(layer, num), device), most(layer, device)]
        for name, (passes, most) in ffn_model.DIVISIONS.items()
    ]
    side = max(side for side in range(1, num + 1) if num % side == 0 and side**2 <= num)
    grid = ffn_model.best_grid(layer, device)
    rows.append(
        [
            f"fsdp {num // side} x tensor {side}",
            *_milliseconds(ffn_model.fsdp_and_tensor(layer, num // side, side), device),
            f"{grid.num_devices:.0f} ({grid.fsdp:.1f} x {grid.tensor:.1f})",
        ]
    )
    heads = [f"{name} {does} (ms)" for name in Passes._fields for does in ("computes", "sends")]
    title = (
        f"Gated feed-forward layer, {layer.num_tokens} tokens, {layer.forward_flops / 1e12:.4g} "
        f"TFLOP forward, on {num} devices"
    )
    return _table(title, ("division", *heads, "most devices"), rows)


def _milliseconds(passes: Passes, device: Device) -> list[object]:
    return [
        seconds * 1e3
        for each in passes
        for seconds in (each.compute_seconds(device), each.communication_seconds(device))
    ]


def scale_table(_: argparse.Namespace) -> str:
    """Return the course's numbers for a stack of very large blocks."""
    stack, mesh = Stack(), Mesh()
    one_axis = Mesh(fsdp_axes=1)
    rows: list[tuple[str, object]] = [
        ("weights", f"{stack.num_parameters:,}"),
        ("masters in fp32", f"{stack.master_bytes / 1e9:.1f} GB"),
        ("gradients in fp32", f"{stack.gradient_bytes / 1e9:.1f} GB"),
        ("optimizer state in fp32", f"{stack.optimizer_bytes / 1e9:.1f} GB"),
        ("state together", f"{stack.state_bytes / 1e9:.1f} GB"),
        ("saved activations in bf16", f"{stack.activation_bytes(1) / 1e6:.2f} MB a token"),
        ("devices of 80 GB for the state", stack.least_devices(80e9)),
        (
            "bytes a device, half of activations A sharded",
            f"({stack.state_bytes / 1e9:.1f} GB + A / 2) / N + A / 2",
        ),
        ("least N at 95 GB, no activations", stack.least_devices(95e9)),
        ("least N at 95 GB, 4,096 tokens", stack.least_devices(95e9, 4096)),
        (
            f"compute-bound tokens a device, X={mesh.fsdp} over {mesh.fsdp_axes} axes, "
            f"Y={mesh.tensor}",
            f"{mesh.least_tokens_per_device:.1f}",
        ),
        ("the same in all", f"{mesh.least_tokens_per_device * mesh.num_devices:,.0f}"),
        ("tokens a device, X over 1 axis", f"{one_axis.least_tokens_per_device:.1f}"),
        ("Y up to which activations stay hidden", f"{mesh.most_tensor(stack):.1f}"),
        ("least tokens a device at any X, Y", f"{mesh.least_tokens_at_any_split(stack):.1f}"),
        *(("lowers it", words) for words in LOWER_THE_BATCH),
    ]
    title = f"{stack.num_blocks} blocks of {stack.d_model} -> {stack.d_ff} -> {stack.d_model}"
    return _table(title, ("quantity", "value"), rows)


TABLES: dict[str, Callable[[argparse.Namespace], str]] = {
    "memory": memory_table,
    "buckets": bucket_table,
    "all_reduce": ring_table,
    "ffn": ffn_table,
    "scale": scale_table,
}


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    written = tabulate(list(rows), headers=headers, tablefmt="pipe", floatfmt=",.4g")
    return f"## {title}\n\n{written}"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m cs336_systems.parallel.accounting",
        description="Memory, messages and device counts on paper, as Markdown tables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all without any"
    )
    made.add_argument("--size", default="xl", choices=PRESETS, help="the language model")
    made.add_argument("--world-size", type=int, default=2, help="ranks, or devices")
    made.add_argument("--communication-bytes", type=int, help="of a gradient's number on its way")
    made.add_argument("--compute-bytes", type=int, help="of a weight's number gathered by fsdp")
    made.add_argument("--bandwidth", type=float, default=3e11, help="of a link, in bytes/s")
    made.add_argument(
        "--call-seconds", type=float, default=2e-5, help="what a call or a step costs by itself"
    )
    made.add_argument("--tokens", type=int, default=65536, help="the feed-forward layer's batch")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the chosen tables; returns the exit status."""
    arguments = parser().parse_args(argv)
    for name, least in (("world_size", 1), ("tokens", 1), ("bandwidth", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            parser().error(f"--{option} must be at least {least}, got {getattr(arguments, name)}")
    if wrong := [name for name in arguments.tables if name not in TABLES]:
        parser().error(f"TABLE must be one of {', '.join(TABLES)}, got {wrong[0]!r}")
    try:
        print("\n\n".join(TABLES[name](arguments) for name in arguments.tables or TABLES))
    except UsageError as error:
        parser().error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
