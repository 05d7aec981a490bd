"""The validation loss over fixed windows: the same ones every time and on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from cs336_basics.nn_utils import cross_entropy
from torch import nn

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.train.batches import spread_starts, windows
from cs336_systems.train.config import PipelineConfig
from cs336_systems.train.step import autocast


def perplexity(loss: float) -> float:
    """Return how many equally likely tokens would be as hard to guess."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def validation_loss(
    model: DataParallel, tokens: np.ndarray, config: PipelineConfig, context_length: int
) -> float:
    """Return the mean loss over windows spread over `tokens`; every rank runs as many forwards.

    Cost: one wait for the device, and one all-reduce of a number.
    """
    training = config.training
    num_windows = config.evaluation.num_batches * training.batch_size
    starts = spread_starts(len(tokens), context_length, num_windows)
    mine = np.split(starts, model.world_size)[model.rank]
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    micro = training.rank_batch_size // training.num_micro_batches
    with evaluating(model):
        for part in np.split(mine, len(mine) // micro):
            inputs, targets = windows(tokens, part, context_length).to(device)
            with autocast(training, device):
                total += cross_entropy(model(inputs), targets) * len(part)
    all_reduce(total, model.group)
    return total.item() / num_windows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model that is being trained in eval mode for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()
