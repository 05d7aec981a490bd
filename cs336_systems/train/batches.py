"""Batches as a function of (seed, step) alone.

The global batch of a step is drawn by a generator that counts in steps, and each rank takes its
slice of it. So the step number is the data position: nothing else has to be saved, and neither a
resume nor another number of ranks changes what the model sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cs336_systems.errors import bad


class Batches:
    """Windows of a long array of tokens, for one rank of `world_size`."""

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(tokens) < context_length + 1:
            rule = f"hold at least context_length + 1 = {context_length + 1} tokens"
            raise bad("batches", "tokens", rule, len(tokens))
        if batch_size % world_size:
            raise bad("batches", "batch_size", f"be a multiple of {world_size} ranks", batch_size)
        self.tokens, self.context_length = tokens, context_length
        self.batch_size, self.seed = batch_size, seed
        share = batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)

    def starts(self, step: int) -> np.ndarray:
        """Return where the windows of the whole global batch begin: (batch_size,) int64."""
        # The key is the seed and the counter the step: streams that cannot overlap.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        return generator.integers(len(self.tokens) - self.context_length, size=self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Return this rank's inputs and targets of a step, on the CPU.

        Shapes: (2, batch_size / world_size, context_length) int64, inputs and then targets.
        """
        return windows(self.tokens, self.starts(step)[self._mine], self.context_length)


def spread_starts(num_tokens: int, context_length: int, num_windows: int) -> np.ndarray:
    """Return where windows begin that are spread evenly over all tokens."""
    return np.linspace(0, num_tokens - context_length - 1, num_windows).astype(np.int64)


def windows(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> Tensor:
    """Cut windows out of `tokens`: inputs, and as targets the same one token later.

    Shapes: starts (batch,) -> (2, batch, context_length) int64.
    """
    cut = tokens[starts[:, np.newaxis] + np.arange(context_length + 1)]
    pair = np.stack([cut[:, :-1], cut[:, 1:]])
    return torch.from_numpy(pair.astype(np.int64))
