"""Memory that the ranks of one host write into each other's, and signals between them.

Who is where in it is the business of `copy_engines`. Here is what its two transports have in
common, and which of them a device takes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cs336_systems.parallel.collectives import Group

PUSHED, AVERAGED = 0, 1
"""The signals: `what I have of your part lies with you`, `my part lies with me, averaged`."""
NUM_SIGNALS = 2
_CYCLE = 2**32


class PeerMemory(Protocol):
    """One rank's end. On a GPU every call queues work on the current stream and returns."""

    memory: Tensor
    """This rank's own. Shapes: (num_bytes,) uint8."""

    def view(self, peer: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a part of `peer`'s memory that begins at byte `offset`. Shapes: (numel,)."""

    def signal(self, which: int, sequence: int) -> None:
        """Tell all peers, once all that came before is done."""

    def wait(self, which: int, sequence: int) -> None:
        """Go on when all peers have signalled `sequence` or a later one.

        Raises: LateRankError on the CPU. On a GPU the stream waits without a limit of its own;
            the group's holds for the next collective behind it.
        """

    def average(self, own: Tensor, others: Tensor, result: Tensor) -> None:
        """Put the average of `own` and `others` into `own` and `result`, added in ranks' order.

        Shapes: own and result (numel,), others (world_size - 1, numel).
        """


def open_peer_memory(
    group: Group, device: torch.device, num_bytes: int, *, where: str
) -> PeerMemory:
    """Allocate so many bytes on every rank of one host; a collective operation."""
    if device.type == "cuda":
        # Needs Triton, which is not there on every machine with a CPU.
        from cs336_systems.parallel.peer_memory_gpu import GpuMemory

        return GpuMemory(group, device, num_bytes, where=where)
    from cs336_systems.parallel.peer_memory_host import HostMemory

    return HostMemory(group, num_bytes, where=where)


def has_come(seen: int, sequence: int) -> bool:
    """Tell whether a 32-bit number that counts on and on has reached `sequence`, as the driver's
    wait for `greater or equal` does: cyclically."""
    return (seen - sequence) % _CYCLE < _CYCLE // 2


def after(sequence: int) -> int:
    """Return the next number."""
    return (sequence + 1) % _CYCLE
