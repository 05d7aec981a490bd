"""The training loop as a program, alone or under torchrun.

    python -m cs336_systems.train.trainer --config config.json --tokenizer tokenizer.json \\
        --train_tokens train.npy --validation_tokens validation.npy --output_dir runs/1

Run again with the same output_dir, it goes on from the newest checkpoint there. SIGTERM and SIGINT
have it save after the step and exit with 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cs336_systems.errors import UsageError
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.atomic import replacing
from cs336_systems.train.config import PipelineConfig, read_config, to_dict
from cs336_systems.train.loop import TrainResult, train
from cs336_systems.train.overrides import OneLineParser, add_options, overridden
from cs336_systems.train.tokenizer import BpeTokenizer

_SILENCE_S = 2.0
_BACKENDS = {None: None, "cpu": "gloo", "cuda": "nccl"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = os.environ.get("RANK", "0")
    try:
        options = _parser().parse_args(arguments)
        config = overridden(_config(options.config), options)
        with init_from_environment(_BACKENDS[config.training.device]) as info:
            try:
                result = _train(config, options, is_first=info.rank == 0)
            except (UsageError, CheckpointError) as error:
                if info.world_size == 1:
                    raise
                # Leaving the group in order would wait for ranks that may not have failed.
                _complain(error, rank)
                os._exit(2)
        if info.rank == 0:
            print(_summary(result), flush=True)
    except (UsageError, CheckpointError) as error:
        _complain(error, rank)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = OneLineParser(
        prog="trainer",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data", "What is trained on, as the pipeline makes it.")
    data.add_argument("--config", type=Path, metavar="FILE", help="JSON with the sections below")
    for name, what in {
        "tokenizer": "the tokenizer that encoded the tokens",
        "train_tokens": "token file to train on",
        "validation_tokens": "token file to judge by",
    }.items():
        data.add_argument(f"--{name}", type=Path, metavar="FILE", required=True, help=what)
    add_options(parser, PipelineConfig)
    return parser


def _config(path: Path | None) -> PipelineConfig:
    return PipelineConfig() if path is None else read_config(PipelineConfig, path)


def _train(config: PipelineConfig, options: argparse.Namespace, *, is_first: bool) -> TrainResult:
    folder = Path(config.output_dir)
    if is_first:
        with replacing(folder / "config.json") as file:
            file.write(json.dumps(to_dict(config), indent=2).encode() + b"\n")
    return train(
        config,
        tokenizer=BpeTokenizer.load(options.tokenizer),
        train_tokens=options.train_tokens,
        validation_tokens=options.validation_tokens,
        output_dir=folder,
    )


def _complain(error: Exception, rank: str) -> None:
    """Print one line. What all ranks say the first one says for them: when it has failed, the
    launcher ends the others before they speak."""
    if rank != "0":
        time.sleep(_SILENCE_S)
    sys.stderr.write(f"{error}\n" if rank == "0" else f"[rank {rank}] {error}\n")
    sys.stderr.flush()


def _summary(result: TrainResult) -> str:
    if result.was_interrupted:
        return (
            f"interrupted after step {result.final_step}, which is saved in "
            f"{result.checkpoint_dir}; the same command goes on from there"
        )
    return (
        f"step {result.final_step}: training loss {result.train_loss:.4f}, "
        f"validation loss {result.validation_loss:.4f}, perplexity {result.perplexity:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
