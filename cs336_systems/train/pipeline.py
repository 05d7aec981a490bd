"""`python -m cs336_systems.train.pipeline --config FILE`: corpus, tokenizer, tokens, training.

The default config trains the tiny preset on this Python's own text, on two CPU cores in about a
minute, to a validation loss below 1.7 nats a token (guessing costs 6.9); 40 of its steps already
come below 3.5. Exit status 0: trained, up to date, or told to stop and saved; 2: a user's fault, in
one line; 128 and more: stopped by a signal before there was something to save.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Read when torch is loaded. Threads that spin while they wait for one another slow a small model
# down fivefold on a machine whose cores are busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from cs336_systems.errors import UsageError
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.train.config import PipelineConfig, read_config
from cs336_systems.train.data_stages import DataStages
from cs336_systems.train.loop import train
from cs336_systems.train.overrides import OneLineParser, add_options, overridden
from cs336_systems.train.pipeline_checks import check_before_work, with_ranks_of_environment
from cs336_systems.train.pipeline_training import Train, Training
from cs336_systems.train.rank_turn import RankTurn
from cs336_systems.train.run_folder import StoppedError, alone_in, stopping

DEFAULT_CONFIG = Path(__file__).parents[1] / "experiments" / "default_pipeline_config.json"
# Rank 0's words to the others.
_TRAIN, _STOP = "train", "stop"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options = _parser().parse_args(arguments)
        config = overridden(read_config(PipelineConfig, options.config), options)
        return run(config, skip_data=options.skip_data)
    except (UsageError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"pipeline: {stopped}", file=sys.stderr)
        return 128 + stopped.number


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="run_pipeline",
        usage="%(prog)s [--config FILE] [--skip_data] [--section.field VALUE ...]",
        description="Train a language model from text: corpus, tokenizer, token files, training. "
        "What is up to date is not done again; a run that was stopped goes on where it was saved.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="JSON with any of the fields below [the small run in experiments/]",
    )
    parser.add_argument(
        "--skip_data",
        action="store_true",
        help="train on the tokenizer and token files that are there, whatever the corpus is",
    )
    add_options(parser, PipelineConfig)
    return parser


def run(config: PipelineConfig, *, skip_data: bool = False, train: Train = train) -> int:
    """Bring a run up to date and return the exit status; under torchrun, as one of its ranks.

    `train` is what each rank in this process calls.

    Raises: UsageError for what a user can change, StoppedError when stopped before training.
    """
    config = with_ranks_of_environment(config)
    folder = Path(config.output_dir)
    training = Training(config, folder, train)
    stages = DataStages(config, folder / "data", say=_say)
    turn = RankTurn()
    if turn.rank > 0:
        return training.as_rank(stages.existing()) if turn.hear() == _TRAIN else 0
    try:
        check_before_work(config, folder, skip_data=skip_data)
        with alone_in(folder), stopping():
            data = stages.existing() if skip_data else stages.run()
            reason = training.reason_to_run(data)
            if reason is None:
                _say("training: up to date (config, tokenizer, tokens unchanged)")
                return training.show()
            _say(f"training: runs, {reason}")
            turn.say(_TRAIN)
            return training.run(data)
    finally:
        # For those that still wait.
        turn.say(_STOP)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
