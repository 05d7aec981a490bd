"""Forward passes of attention over tiers of lengths, as many queries as keys and not.

`python cs336_systems/experiments/benchmark_attention_sweep.py --help` says how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path, maybe in a fresh clone: the packages beside it come first.
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT), str(_ROOT / "cs336-basics")]

from cs336_systems.attention import ATTENTION
from cs336_systems.errors import bad
from cs336_systems.experiments.arguments import (
    add_common,
    known,
    new_parser,
    whole,
)
from cs336_systems.experiments.suite import run_command

WHERE = "benchmark_attention_sweep"
MODULE = f"cs336_systems.experiments.{WHERE}"
TIERS = {"Small": 128, "Medium": 256, "Large": 512, "XL": 1024, "XXL": 2048}
KERNELS = ("scaled_dot_prod_attention", "vectorized_torch", "flash_attention_triton", "sdpa")
_NUMBERS = {
    "warmup": "warmup-rounds",
    "iters": "rounds",
    "batch_size": "sweep-batch",
    "num_heads": "sweep-heads",
}
"""Numbers and the benchmarks' options for them."""

_EPILOG = f"""\
Tiers: {", ".join(f"{name} {length}" for name, length in TIERS.items())}; every length of queries
meets every length of keys. On CUDA devices the default is batch 4, 16 heads and bf16, on a CPU
batch 1, 4 heads and fp32.

Written to --output_dir: attention_sweep_results.csv, attention_sweep_forward.png,
attention_sweep_heatmap.png, attention_sweep_scaling.png, attention_sweep_report.md, and what was
measured, as JSON, in measurements/. Speed-up is against scaled_dot_prod_attention, or the first
kernel without it. The same command after a run that was cut short continues it. The exit status is
0 when every case was measured or has a reason in the report, 1 when one was wrong, 2 for a wrong
option.

kernels:  {", ".join(ATTENTION)}

examples:
  python cs336_systems/experiments/{WHERE}.py --smoke
  python cs336_systems/experiments/{WHERE}.py --custom_tiers 128:64 256:128 512:256 1024:512 \\
      --warmup 10 --iters 50
  python cs336_systems/experiments/{WHERE}.py --kernels flash_attention_triton sdpa \\
      --head_dims 64 128 --causal
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's options; those that are not given are the benchmark's to choose."""
    made = new_parser(WHERE, __doc__, _EPILOG)
    number: dict[str, Any] = {"type": whole(1), "metavar": "N"}
    made.add_argument(
        "--custom_tiers",
        nargs="+",
        metavar="QUERIES:KEYS",
        help="these in place of the tiers, powers of two; 128 alone is 128:128",
    )
    rows = f"default: {' '.join(KERNELS)}"
    made.add_argument("--kernels", nargs="+", default=KERNELS, metavar="KERNEL", help=rows)
    made.add_argument("--head_dims", nargs="+", **number, help="default: 64")
    made.add_argument("--batch_size", **number, help="of q, k and v")
    made.add_argument("--num_heads", **number, help="of q, k and v")
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of q, k and v")
    made.add_argument("--causal", action="store_true", help="query i sees keys j <= i alone")
    made.add_argument(
        "--warmup", type=whole(0), default=5, metavar="N", help="untimed calls (default: 5)"
    )
    made.add_argument("--iters", default=20, **number, help="timed calls (default: 20)")
    add_common(made)
    return made


def pair(word: str) -> str:
    """Return a tier as QUERIES:KEYS.

    Raises: UsageError for anything but one or two powers of two.
    """
    sides = word.split(":") if ":" in word else [word, word]
    if len(sides) != 2 or not all(
        side.isdecimal() and int(side).bit_count() == 1 for side in sides
    ):
        rule = "be QUERIES:KEYS, both powers of two, e.g. 128:64"
        raise bad(WHERE, "--custom_tiers", rule, word)
    return ":".join(str(int(side)) for side in sides)


def every_pair(lengths: Iterable[int]) -> list[str]:
    """Return each length of queries with each of keys, short ones first."""
    lengths = tuple(lengths)
    pairs = sorted((max(q, k), q, k) for q in lengths for k in lengths)
    return [f"{queries}:{keys}" for _, queries, keys in pairs]


def options_of(given: argparse.Namespace) -> list[str]:
    """Return the pytest options for what the user has given.

    Raises: UsageError for an unknown kernel or a tier that is none.
    """
    kernels = known(WHERE, "--kernels", ATTENTION, given.kernels)
    options = [f"--rows={','.join(kernels)}"]
    if given.smoke and given.kernels is KERNELS:
        options = []
    if given.custom_tiers:
        options.append(f"--tiers={','.join(map(pair, given.custom_tiers))}")
    elif not given.smoke:
        options.append(f"--tiers={','.join(every_pair(TIERS.values()))}")
    if given.head_dims:
        options.append(f"--head-dims={','.join(map(str, given.head_dims))}")
    options += [f"--dtypes={given.dtype}"] if given.dtype else []
    options += ["--sweep-causal"] if given.causal else []
    for name, option in _NUMBERS.items():
        if (value := getattr(given, name)) is not None:
            options.append(f"--{option}={value}")
    options += ["--smoke"] if given.smoke else []
    return options + ([f"--device={given.device}"] if given.device else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run_command("attention_sweep", MODULE, parser(), options_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
