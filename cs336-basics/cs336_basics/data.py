"""Training batches out of one long array of token ids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def get_batch(
    dataset: np.ndarray,
    batch_size: int,
    context_length: int,
    device: torch.device | str | int,
    generator: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut random windows out of `dataset`: inputs, and as targets the same one token later.

    The windows' starts come from `generator` or else from torch's seed. Only the windows are read,
    so a memory-mapped file of any size will do.
    Shapes: dataset (tokens,) of any integer type, result two (batch_size, context_length) int64.
    Raises: ValueError for a dataset too short for one window, sizes below one, or an array that is
        not one-dimensional and integer.
    """
    _check(dataset, batch_size, context_length)
    num_starts = len(dataset) - context_length
    if generator is None:
        starts = torch.randint(num_starts, (batch_size,), device="cpu").numpy()
    else:
        starts = generator.integers(num_starts, size=batch_size)
    windows = dataset[starts[:, np.newaxis] + np.arange(context_length + 1)]
    inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
    return _send(inputs, device), _send(targets, device)


def _send(batch: np.ndarray, device: torch.device | str | int) -> Tensor:
    tensor = torch.from_numpy(batch)
    if torch.device(device).type == "cuda":
        # From pinned memory the copy runs while the host prepares the step.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _check(dataset: np.ndarray, batch_size: int, context_length: int) -> None:
    if dataset.ndim != 1 or not np.issubdtype(dataset.dtype, np.integer):
        raise ValueError(
            "get_batch: dataset must be one-dimensional and of integers, "
            f"got {dataset.dtype} of shape {dataset.shape}"
        )
    for name, size in (("batch_size", batch_size), ("context_length", context_length)):
        if size < 1:
            raise ValueError(f"get_batch: {name} must be at least 1, got {size!r}")
    if len(dataset) < context_length + 1:
        raise ValueError(
            "get_batch: dataset must hold at least context_length + 1 = "
            f"{context_length + 1} tokens, got {len(dataset)}"
        )
