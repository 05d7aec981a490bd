"""What all units of one model share: between whom they travel, beside what, and the accounts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cs336_systems.parallel.collectives import Group
from cs336_systems.parallel.side_stream import SideStream


@dataclass
class GatheredBytes:
    """How much of the gathered vectors is alive, and the most that ever was."""

    now: int = 0
    peak: int = 0

    def add(self, num_bytes: int) -> None:
        """Count memory that was taken, or given back where it is negative."""
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


@dataclass
class Wire:
    """How vectors travel: between whom, beside what, and what becomes of a sum."""

    group: Group
    rank: int
    world_size: int
    side: SideStream
    average_op: Any
    divisor: int
    """What the reduction's result is still to be divided by."""
    watch: Callable[[list[Tensor]], None]
    """Sees the local gradients before they are reduced."""
    gathered: GatheredBytes = field(default_factory=GatheredBytes)
