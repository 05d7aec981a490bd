"""Short training runs of one language model: attention kernels x data-parallel wrappers.

`python cs336_systems/experiments/benchmark_lm_matrix.py --help` says how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:
    # Run by its path, maybe in a fresh clone: the packages beside it come first.
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT), str(_ROOT / "cs336-basics")]

from cs336_systems.attention import ATTENTION
from cs336_systems.experiments.arguments import (
    Formatter,
    add_common,
    command_line,
    file_path,
    known,
    typed,
    whole,
)
from cs336_systems.experiments.suite import Experiment, finish, this_machine
from cs336_systems.parallel import STRATEGIES

WHERE = "benchmark_lm_matrix"
MODULE = f"cs336_systems.experiments.{WHERE}"
KERNELS = ("scaled_dot_prod_attention", "vectorized_torch", "flash_attention_triton")
WRAPPERS = ("none", "naive", "flashddp", "torch_ddp")
_MODEL = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size")
_NUMBERS = {
    "epochs": "lm-epochs",
    "steps": "lm-epoch-steps",
    "tr_batch_size": "rank-batch",
    "context_length": "contexts",
}
"""Numbers and the benchmarks' options for them."""

_EPILOG = f"""\
An epoch is --steps steps of one rank; n ranks see the same tokens in 1/n of the steps. `none` is
one rank alone, every other wrapper has --ranks. On CUDA devices the model's default is d_model 512,
d_ff 4096, 24 layers, 16 heads, context 256, vocabulary 10,000, batch 8, 5 epochs of 10 steps in
bf16; on a CPU it is one that takes a minute or two.

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
    made = argparse.ArgumentParser(
        prog=WHERE, description=__doc__, epilog=_EPILOG, formatter_class=Formatter
    )
    files = made.add_argument_group("data (without files: seeded random tokens)")
    files.add_argument("--train_path", type=Path, help=".npy of token ids to train on")
    files.add_argument("--val_path", type=Path, help=".npy of token ids for a last loss")
    run = made.add_argument_group("run")
    run.add_argument("--epochs", type=whole(1), help="timed epochs")
    run.add_argument("--steps", type=whole(1), help="steps of one rank in an epoch")
    run.add_argument("--tr_batch_size", type=whole(1), help="sequences on each rank in a step")
    run.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast")
    model = made.add_argument_group("model")
    model.add_argument("--context_length", type=whole(1), help="tokens in a sequence")
    for name in _MODEL:
        model.add_argument(f"--{name}", type=whole(1), help="as in ModelConfig")
    matrix = made.add_argument_group("matrix")
    matrix.add_argument("--kernels", nargs="+", default=KERNELS, metavar="KERNEL", help="rows")
    matrix.add_argument(
        "--wrappers", nargs="+", default=WRAPPERS, metavar="WRAPPER", help="columns"
    )
    matrix.add_argument(
        "--ranks", type=whole(1), help="of every wrapper but none; default: all GPUs, at least 2"
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


def run(arguments: Sequence[str]) -> int:
    """Run the matrix and return the exit status."""
    given = parser().parse_args(arguments)
    experiment = Experiment(
        study="lm_matrix",
        options=tuple(options_of(given)),
        output_dir=given.output_dir.resolve(),
        command=typed(MODULE, arguments),
    )
    return experiment.run(this_machine(given.device))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return finish(partial(run, command_line(arguments)))


if __name__ == "__main__":
    sys.exit(main())
