"""Batches for short training runs: windows of token files, or of seeded random tokens.

Imports no pytest: every rank draws its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cs336_basics.data import get_batch
from torch import Tensor

from cs336_systems.config import ModelConfig
from cs336_systems.errors import UsageError, bad

_RANDOM_TOKENS = 2**18
_VALIDATION_BATCHES = 4

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """What to train and to validate on; None is random tokens, and no validation."""

    train_path: str | None = None
    val_path: str | None = None

    def training_batches(
        self, config: ModelConfig, batch: int, rank: int, device: torch.device
    ) -> Iterator[Batch]:
        """Yield one batch after the other without end, different ones on every rank."""
        if self.train_path is None:
            random = np.random.default_rng(0)
            tokens = random.integers(config.vocab_size, size=_RANDOM_TOKENS + config.context_length)
        else:
            tokens = open_tokens("--train-path", self.train_path, config.context_length)
        starts = np.random.default_rng(rank)
        while True:
            yield get_batch(tokens, batch, config.context_length, device, starts)

    def validation_batches(
        self, config: ModelConfig, batch: int, device: torch.device
    ) -> list[Batch]:
        """Return the same few batches on every rank; none without a file."""
        if self.val_path is None:
            return []
        tokens = open_tokens("--val-path", self.val_path, config.context_length)
        starts = np.random.default_rng(0)
        return [
            get_batch(tokens, batch, config.context_length, device, starts)
            for _ in range(_VALIDATION_BATCHES)
        ]


def open_tokens(option: str, path: str, context: int) -> np.ndarray:
    """Map a `.npy` of token ids into memory.

    Raises: UsageError for a file that is missing, no such array, or shorter than one window.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"benchmarks: {option}: {path} cannot be read: {reason}") from error
    except (ValueError, EOFError):
        rule = "be a .npy file of token ids"
        raise bad("benchmarks", option, rule, path) from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise bad("benchmarks", option, "be a .npy file of one row of integers", path)
    if len(tokens) < context + 1:
        rule = f"hold at least context_length + 1 = {context + 1} tokens"
        raise bad("benchmarks", option, rule, len(tokens))
    return tokens


def check_tokens(option: str, path: str | None, config: ModelConfig) -> int:
    """Read all of a file, if there is one, and return how many tokens it holds.

    Raises: UsageError as `open_tokens`, and for ids that the model's vocabulary does not have.
    """
    if path is None:
        return 0
    tokens = open_tokens(option, path, config.context_length)
    if (least := int(tokens.min())) < 0 or int(tokens.max()) >= config.vocab_size:
        rule = f"hold ids below the vocabulary's {config.vocab_size}"
        got = least if least < 0 else int(tokens.max())
        raise bad("benchmarks", f"{option} {Path(path).name}", rule, got)
    return len(tokens)
