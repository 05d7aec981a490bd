"""What ranks do in the tests of checkpoints; imports no pytest."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel import checkpoint, checkpoint_files
from cs336_systems.parallel.checkpoint import CheckpointError


def state_of(rank: int, step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "model": {"weight": torch.rand(5 + rank, 3, generator=generator), "none": torch.empty(0)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "groups": [{"lr": 0.1}]},
        "rank": rank,
        "order": [3, 1, 2],
    }


def same(a: object, b: object) -> bool:
    """Tell whether two states have the same structure and bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def save_in(folders: list[str], step: int, **options: Any) -> None:
    for folder in folders:
        checkpoint.save(folder, state_of(dist.get_rank(), step), step=step, **options)


def load_from(folders: list[str]) -> list[int | str]:
    """Return the step of what each folder gives, after a look at its values; or the error."""
    found: list[int | str] = []
    for folder in folders:
        try:
            state, step = checkpoint.load(folder)
        except CheckpointError as error:
            found.append(str(error))
        else:
            rank = state["rank"]
            assert rank in (0, dist.get_rank())
            assert same(state, state_of(rank, step))
            found.append(step)
    return found


def load_with_log(folder: str) -> tuple[int | str, list[str]]:
    """Load, and return the lines that are logged on the way too."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(checkpoint.__name__)
    logger.addHandler(handler)
    try:
        return load_from([folder])[0], lines
    finally:
        logger.removeHandler(handler)


def save_unequal(folder: str, kind: str) -> str:
    """Save what rank 1 has otherwise than rank 0; return the error."""
    odd = dist.get_rank() == 1
    state = state_of(dist.get_rank(), 9)
    if kind == "object" and odd:
        state["model"]["module"] = torch.nn.Linear(1, 1)
    try:
        checkpoint.save(folder, state, step=10 if kind == "step" and odd else 9)
    except CheckpointError as error:
        return str(error)
    return "no error"


class FullFile:
    """A file on a disk without space."""

    def write(self, data: Any) -> int:
        with Path("/dev/full").open("wb", buffering=0) as full:
            return full.write(data)


@contextmanager
def failing(operation: str, rank: int, first: int, last: int) -> Iterator[None]:
    """Have calls number `first` to `last` of an operation find the disk full on one rank."""
    owner = checkpoint_files.HashedFile if operation == "write" else os
    real, calls = getattr(owner, operation), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += dist.get_rank() == rank
        if dist.get_rank() == rank and first <= calls[0] <= last:
            if operation != "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            args[0]._file = FullFile()
        return real(*args, **kwargs)

    with mock.patch.object(owner, operation, fail):
        yield


def save_on_full_disk(folder: str, operation: str, rank: int, first: int, last: int) -> str:
    with failing(operation, rank, first, last):
        try:
            checkpoint.save(folder, state_of(dist.get_rank(), 9), step=9)
        except CheckpointError as error:
            return str(error)
    return "no error"


def save_and_die(folder: str, rank: int, number: int) -> None:
    """Save, and end by a signal where one rank has its file half written."""
    if dist.get_rank() == rank:
        os.fsync = lambda _: os.kill(os.getpid(), number)
    checkpoint.save(folder, state_of(dist.get_rank(), 9), step=9)
