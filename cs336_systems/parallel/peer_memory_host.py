"""Memory shared by the ranks of one host on the CPU: a file that all of them map.

The file has no name by the time training begins, so that nothing is left of it, however the ranks
end. A waiting rank polls: what runs here are tests and first steps, whose ranks outnumber the
cores. That a signal is seen no earlier than what it tells of is what processors of the x86 family
ensure for stores of one thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel.collectives import (
    Group,
    all_gather_object,
    is_power_of_two,
    process_group,
)
from cs336_systems.parallel.peer_memory import NUM_SIGNALS, has_come

_FLAG_BYTES = 4
_EAGER_POLLS = 100
_POLL_S = 1e-4


class LateRankError(dist.DistError):
    """A rank did not come within the group's limit; it has ended, hangs, or has fewer steps."""

    def __init__(self, where: str, rank: int, limit_s: float) -> None:
        self.rank = rank
        super().__init__(f"{where}: rank {rank} must come within {limit_s:g} s, got no signal")


class HostMemory:
    """`peer_memory.PeerMemory` in the host's memory."""

    def __init__(self, group: Group, num_bytes: int, *, where: str) -> None:
        self._where, self._group = where, group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._peers = [peer for peer in range(self._world_size) if peer != self._rank]
        self._num_bytes = num_bytes
        self._limit_s = _limit_s(group)
        num_flags = self._world_size**2 * NUM_SIGNALS
        begin = self._world_size * num_bytes
        self._map = _map_together(begin + num_flags * _FLAG_BYTES, group, where)
        self._flags = memoryview(self._map)[begin:].cast("I")
        self.memory = self.view(self._rank, 0, num_bytes, torch.uint8)

    def view(self, peer: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """As `PeerMemory.view`."""
        begin = peer * self._num_bytes + offset
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=begin)

    def signal(self, which: int, sequence: int) -> None:
        """As `PeerMemory.signal`."""
        for peer in self._peers:
            self._flags[self._flag(peer, which, self._rank)] = sequence

    def wait(self, which: int, sequence: int) -> None:
        """As `PeerMemory.wait`."""
        deadline = time.monotonic() + self._limit_s
        for peer in self._peers:
            flag, num_polls = self._flag(self._rank, which, peer), 0
            while not has_come(self._flags[flag], sequence):
                num_polls += 1
                if time.monotonic() > deadline:
                    raise LateRankError(self._where, self._global_rank(peer), self._limit_s)
                # The first polls give way only to those who have something to do.
                time.sleep(0 if num_polls < _EAGER_POLLS else _POLL_S)

    def average(self, own: Tensor, others: Tensor, result: Tensor) -> None:
        """As `PeerMemory.average`."""
        rows = list(others)
        rows.insert(self._rank, own)
        # Sums of 16-bit numbers are rounded once, at the end.
        wide = torch.promote_types(own.dtype, torch.float32)
        total = rows[0].to(wide, copy=True)
        for row in rows[1:]:
            total += row
        if is_power_of_two(self._world_size):
            total *= 1 / self._world_size
        else:
            total /= self._world_size
        own.copy_(total)
        result.copy_(own)

    def _flag(self, owner: int, which: int, source: int) -> int:
        return (owner * NUM_SIGNALS + which) * self._world_size + source

    def _global_rank(self, peer: int) -> int:
        return peer if self._group is None else dist.get_global_rank(self._group, peer)


def _limit_s(group: Group) -> float:
    """Return how long the group's own collectives wait."""
    backend = process_group(group)._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def _map_together(num_bytes: int, group: Group, where: str) -> mmap.mmap:
    """Map one file on all ranks, zeros at first.

    Raises: RuntimeError with the same text on all ranks where one of them cannot.
    """
    path, problem, mapped = "", "", None
    try:
        if dist.get_rank(group) == 0:
            path, problem = _create(num_bytes)
        path, problem = all_gather_object((path, problem), group)[0]
        if not problem:
            mapped, problem = _open(path, num_bytes)
        problems = all_gather_object(problem, group)
    finally:
        if path and dist.get_rank(group) == 0:
            Path(path).unlink(missing_ok=True)
    for rank, problem in enumerate(problems):
        if problem:
            raise RuntimeError(
                f"{where}: rank {rank} could not map {num_bytes} bytes of shared memory: {problem}"
            )
    assert mapped is not None
    return mapped


def _create(num_bytes: int) -> tuple[str, str]:
    """Make a file with room for so many bytes; returns its path, or what went wrong."""
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="cs336-peers-")
        with contextlib.closing(os.fdopen(descriptor, "wb")):
            # Where a disk is full this says so; a write to memory would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                os.truncate(descriptor, num_bytes)
    except OSError as error:
        if path:
            Path(path).unlink(missing_ok=True)
        return "", f"{type(error).__name__}: {error}"
    return path, ""


def _open(path: str, num_bytes: int) -> tuple[mmap.mmap | None, str]:
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), num_bytes), ""
    except OSError as error:
        return None, f"{type(error).__name__}: {error}"
