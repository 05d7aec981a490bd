"""Short training runs of one language model: attention kernels x data-parallel wrappers.

`python cs336_systems/experiments/benchmark_lm_matrix.py --help` says how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path, maybe in a fresh clone: the packages beside it come first.
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT), str(_ROOT / "cs336-basics")]

from cs336_systems.attention import ATTENTION
from cs336_systems.experiments.arguments import (
    add_common,
    file_path,
    known,
    new_parser,
    whole,
)
from cs336_systems.experiments.suite import run_command
from cs336_systems.parallel import STRATEGIES

WHERE = "benchmark_lm_matrix"
MODULE = f"cs336_systems.experiments.{WHERE}"
KERNELS = ("scaled_dot_prod_attention", "vectorized_torch", "flash_attention_triton")
WRAPPERS = ("none", "naive", "flashddp", "torch_ddp")
_MODEL = {
    "d_model": "width of the residual stream",
    "d_ff": "width of the feed-forward layers",
    "num_layers": "transformer blocks",
    "num_heads": "attention heads of a block",
    "vocab_size": "token ids that there are",
}
_NUMBERS = {
    "epochs": "lm-epochs",
    "steps": "lm-epoch-steps",
    "tr_batch_size": "rank-batch",
    "context_length": "contexts",
}
"""Numbers and the benchmarks' options for them."""

_EPILOG = f"""\
An epoch is --steps steps of one rank; n ranks see the same tokens in 1/n of the steps. Without
--steps it is at most one pass over the file. `none` is one rank alone, every other wrapper has
--ranks. On CUDA devices the defaults are d_model 512, d_ff 4096, 24 layers, 16 heads, context 256,
vocabulary 10,000, batch 8, and 5 epochs of 10 steps in bf16; on a CPU, what takes a minute or two.

Written to --output_dir: lm_matrix_results.csv, lm_matrix_time.png, lm_matrix_memory.png,
lm_matrix_throughput.png, lm_matrix_report.md, and what was measured, as JSON, in measurements/.
The same command after a run that was cut short continues it. The exit status is 0 when every case
was measured or has a reason in the report, 1 when one went wrong, 2 for a wrong option.

kernels:   {", ".join(ATTENTION)}
wrappers:  {", ".join(STRATEGIES)}

examples:
  python cs336_systems/experiments/{WHERE}.py --smoke
  python cs336_systems/experiments/{WHERE}.py --epochs 3 --tr_batch_size 16 --context_length 256 \\
      --kernels flash_attention_triton
  python cs336_systems/experiments/{WHERE}.py --train_path data/tokenized/ts_train.npy \\
      --val_path data/tokenized/ts_valid.npy --wrappers naive flashddp torch_ddp --ranks 2
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's options; those that are not given are the benchmark's to choose."""
    made = new_parser(WHERE, __doc__, _EPILOG)
    files = made.add_argument_group("data")
    npy: dict[str, Any] = {"type": Path, "metavar": "NPY"}
    files.add_argument("--train_path", **npy, help="token ids (default: seeded random tokens)")
    files.add_argument("--val_path", **npy, help="token ids for a loss after the last step")
    number: dict[str, Any] = {"type": whole(1), "metavar": "N"}
    run = made.add_argument_group("run")
    run.add_argument("--epochs", **number, help="timed epochs")
    run.add_argument("--steps", **number, help="steps of one rank in an epoch")
    run.add_argument("--tr_batch_size", **number, help="sequences on each rank in a step")
    run.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast")
    model = made.add_argument_group("model")
    model.add_argument("--context_length", **number, help="tokens in a sequence")
    for name, words in _MODEL.items():
        model.add_argument(f"--{name}", **number, help=words)
    matrix = made.add_argument_group("matrix")
    for name, rows in (("kernel", KERNELS), ("wrapper", WRAPPERS)):
        words = f"default: {' '.join(rows)}"
        matrix.add_argument(f"--{name}s", nargs="+", default=rows, metavar=name.upper(), help=words)
    matrix.add_argument(
        "--ranks", **number, help="of every wrapper but none (default: all GPUs, at least 2)"
    )
    add_common(made)
    return made


def options_of(given: argparse.Namespace) -> list[str]:
    """Return the pytest options for what the user has given.

    Raises: UsageError for an unknown kernel or wrapper, or a file that is not there.
    """
    # A smoke run has the benchmark's own few, unless others are asked for.
    own = given.smoke and given.kernels is KERNELS and given.wrappers is WRAPPERS
    kernels = known(WHERE, "--kernels", ATTENTION, given.kernels)
    wrappers = known(WHERE, "--wrappers", STRATEGIES, given.wrappers)
    options = [] if own else [f"--rows={','.join(kernels)}", f"--strategies={','.join(wrappers)}"]
    for name, option in (_NUMBERS | {"ranks": "ranks", "precision": "precisions"}).items():
        if (value := getattr(given, name)) is not None:
            options.append(f"--{option}={value}")
    fields = [f"{name}={value}" for name in _MODEL if (value := getattr(given, name)) is not None]
    if fields:
        options.append(f"--lm-model={','.join(fields)}")
    for name in ("train_path", "val_path"):
        if (path := getattr(given, name)) is not None:
            options.append(f"--{name.replace('_', '-')}={file_path(WHERE, f'--{name}', path)}")
    options += ["--smoke"] if given.smoke else []
    return options + ([f"--device={given.device}"] if given.device else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run_command("lm_matrix", MODULE, parser(), options_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
