"""Checkpoints written beside training, which waits no longer than a copy to the host takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel import checkpoint

# How long a save under way may take when training has failed beside it.
_LEAVE_S = 10.0


class Saver:
    """Saves whole states, one at a time, on a thread and in a group of its own on every rank.

    A failed save is raised by the next call.
    """

    def __init__(self, folder: Path, *, keep: int, device: torch.device) -> None:
        self.folder = folder
        self._keep = keep
        self._group = dist.new_group(backend="gloo")
        self._host = HostCopy(pinned=device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.blocked_seconds = 0.0
        """How long the last save held up training."""

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Begin to save rank 0's `state`, which may change as soon as this returns.

        Raises: CheckpointError when the save before this one failed.
        """
        begin = time.perf_counter()
        self.wait()
        copy = self._host.copy(dict(state)) if dist.get_rank() == 0 else {}
        self._thread = threading.Thread(
            target=self._write, args=(copy, step), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.blocked_seconds = time.perf_counter() - begin

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises: CheckpointError when it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, and leave the group."""
        self.wait()
        dist.destroy_process_group(self._group)

    def abandon(self) -> None:
        """Give a save under way a little time: training has failed, maybe with a rank it needs."""
        if self._thread is not None:
            self._thread.join(_LEAVE_S)

    def _write(self, state: Mapping[str, Any], step: int) -> None:
        try:
            checkpoint.save(
                self.folder, state, step=step, replicated=True, keep=self._keep, group=self._group
            )
        except BaseException as error:
            self._error = error


class HostCopy:
    """Copies states into host memory that is kept from one copy to the next.

    Cost: the state once more on the host, and no fresh pages after the first time.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, state: Any) -> Any:
        """Return the state with all tensors copied; the next copy overwrites them."""
        copied = self._copied(state, "")
        if self._pinned:
            torch.cuda.synchronize()
        return copied

    def _copied(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value, place).copy_(value, non_blocking=self._pinned)
        if isinstance(value, Mapping):
            return {key: self._copied(item, f"{place}.{key!r}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = (self._copied(item, f"{place}.{i}") for i, item in enumerate(value))
            return type(value)(items)
        return value

    def _buffer(self, like: Tensor, place: str) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._pinned)
            self._buffers[place] = buffer
        return buffer
