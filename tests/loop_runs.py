"""Small training runs, in this process or on ranks; imports no pytest."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.errors import UsageError
from cs336_systems.parallel import checkpoint
from cs336_systems.train import reporter
from cs336_systems.train import tokenizer as tokenizers
from cs336_systems.train.config import (
    CheckpointingConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelSection,
    PipelineConfig,
    TrainingConfig,
)
from cs336_systems.train.corpus import CorpusConfig, Piece, read_corpus
from cs336_systems.train.loop import TrainResult, train
from cs336_systems.train.step import Stepper
from cs336_systems.train.tokenizer import BpeTokenizer
from cs336_systems.train.tokens import encode_corpus

VOCAB_SIZE = 300
SMALL = PipelineConfig(
    model=ModelSection(preset="debug", context_length=16),
    training=TrainingConfig(
        num_steps=8,
        batch_size=8,
        warmup_steps=2,
        max_learning_rate=1e-2,
        # A large one, lest the sign of a rounding error decide on a whole step.
        eps=1e-3,
        device="cpu",
    ),
    evaluation=EvaluationConfig(interval=4, num_batches=2, sample_tokens=8),
    checkpointing=CheckpointingConfig(),
    logging=LoggingConfig(interval=2, progress=False),
)


def changed(config: PipelineConfig, changes: Mapping[str, Any]) -> PipelineConfig:
    """Return the config with fields replaced: `{"training.seed": 3}`."""
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if field:
            value = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: value})
    return config


def make_data(folder: Path, megabytes: float = 0.05) -> Path:
    """Write a tokenizer and token files; small, since tests train on little."""
    pieces: list[Piece] = list(read_corpus(CorpusConfig(megabytes=megabytes)))
    tokenizer = tokenizers.train(pieces, VOCAB_SIZE)
    tokenizer.save(folder / "tokenizer.json")
    encode_corpus(pieces, tokenizer, folder)
    return folder


def run(
    data: str,
    out: str,
    changes: Mapping[str, Any] | None = None,
    *,
    signal_at: tuple[int, int, int] | None = None,
    draw: bool = False,
) -> TrainResult:
    """Train the small config with changes; `signal_at` is a step, a rank and what it is sent.

    Drawing would take longer than the training.
    """
    folder = Path(data)
    with ExitStack() as stack:
        if not draw:
            stack.enter_context(mock.patch.object(reporter, "draw_curve"))
        if signal_at is not None:
            stack.enter_context(_signalling(*signal_at))
        return train(
            changed(SMALL, changes or {}),
            tokenizer=BpeTokenizer.load(folder / "tokenizer.json"),
            train_tokens=folder / "train.npy",
            validation_tokens=folder / "validation.npy",
            output_dir=Path(out),
        )


def _signalling(step: int, rank: int, number: int) -> Any:
    """Have a rank get a signal in the middle of a step."""
    real = Stepper.step

    def stepping(self: Stepper, now: int, batch: Tensor) -> Any:
        if (now, dist.get_rank()) == (step, rank):
            os.kill(os.getpid(), number)
        return real(self, now, batch)

    return mock.patch.object(Stepper, "step", stepping)


def run_broken(data: str, out: str, changes: Mapping[str, Any], stop_at: int) -> list[TrainResult]:
    """Train with an interruption in the middle; return both parts' results."""
    first = run(data, out, changes, signal_at=(stop_at, 0, signal.SIGTERM))
    return [first, run(data, out, changes)]


def saved(out: str | Path) -> tuple[dict[str, Any], int]:
    """Return the newest checkpoint of a run, without how long it took."""
    state, step = _load_alone(Path(out) / "checkpoints")
    del state["seconds"]
    return state, step


def _load_alone(folder: Path) -> tuple[dict[str, Any], int]:
    with mock.patch.object(dist, "is_initialized", return_value=False):
        return checkpoint.load(folder)


def weights(out: str | Path) -> dict[str, Tensor]:
    return torch.load(Path(out) / "model.pt", weights_only=True)


def error_of(data: str, out: str, changes: Mapping[str, Any]) -> str:
    """Train what is refused; return the refusal."""
    try:
        run(data, out, changes)
    except UsageError as error:
        return str(error)
    return "no error"


def error_where_data_is_missing(data: str, out: str) -> str:
    """Train with token files that only rank 0 has."""
    folder = Path(data)
    tokens = folder if dist.get_rank() == 0 else Path("nowhere")
    try:
        train(
            changed(SMALL, {"training.ddp_wrapper": "flat"}),
            tokenizer=BpeTokenizer.load(folder / "tokenizer.json"),
            train_tokens=tokens / "train.npy",
            validation_tokens=tokens / "validation.npy",
            output_dir=Path(out),
        )
    except UsageError as error:
        return str(error)
    return "no error"
