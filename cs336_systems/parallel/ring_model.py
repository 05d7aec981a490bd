"""All-reduce on paper: what a rank sends, in how many steps, and how long that takes.

Every rank has one link, over which it sends and receives at the same time, `bytes_per_s` each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cs336_systems.errors import bad, unknown


class Exchange(NamedTuple):
    """One way to make all ranks hold the sum of their messages."""

    num_steps: int
    """Messages that must wait for one another."""
    num_bytes: float
    """What a link carries one way in each step, where it is busiest, all steps together."""

    def seconds(self, bytes_per_s: float, step_seconds: float = 0.0) -> float:
        """Return how long it takes, where each step costs `step_seconds` whatever its size."""
        return self.num_steps * step_seconds + self.num_bytes / bytes_per_s


def ring(num_bytes: float, world_size: int) -> Exchange:
    """Reduce-scatter, then all-gather, of n parts: each rank sends one part a step to the next.

    Cost: 2 (n - 1) steps of 1/n of the message. No way sends less.
    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", section 3.
    """
    num_steps = 2 * (world_size - 1)
    return Exchange(num_steps, num_steps * num_bytes / world_size)


def whole_ring(num_bytes: float, world_size: int) -> Exchange:
    """Whole messages travel round the ring; each rank adds up those that pass.

    Cost: n - 1 steps of a whole message: half of the ring's steps, n/2 times its bytes.
    """
    return Exchange(world_size - 1, (world_size - 1) * num_bytes)


def everyone_to_everyone(num_bytes: float, world_size: int) -> Exchange:
    """Each rank sends its whole message to all others at once, and adds up what it gets.

    Cost: one step, in which a link carries n - 1 messages.
    """
    return Exchange(min(world_size - 1, 1), (world_size - 1) * num_bytes)


def direct(num_bytes: float, world_size: int) -> Exchange:
    """Each rank is sent its part of all messages at once, adds it up and sends it to all others.

    Cost: two steps; the ring's bytes. Needs a path from every rank to every other.
    """
    steps = 2 * min(world_size - 1, 1)
    return Exchange(steps, 2 * (world_size - 1) * num_bytes / world_size)


def tree(num_bytes: float, world_size: int) -> Exchange:
    """Pairs add up whole messages until one rank has the sum, which goes back the same way.

    Cost: 2 ceil(log2 n) steps of a whole message: the root receives in half, sends in the others.
    Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
        MPICH", section 4.
    """
    depth = math.ceil(math.log2(world_size))
    return Exchange(2 * depth, 2 * depth * num_bytes)


ALL_REDUCES: dict[str, Callable[[float, int], Exchange]] = {
    "ring": ring,
    "whole_ring": whole_ring,
    "everyone_to_everyone": everyone_to_everyone,
    "direct": direct,
    "tree": tree,
}


def all_reduce(way: str, num_bytes: float, world_size: int) -> Exchange:
    """Return what one of `ALL_REDUCES` costs.

    Raises: UsageError for a way that is not among them, or no ranks.
    """
    if way not in ALL_REDUCES:
        raise unknown("all_reduce", "way", ALL_REDUCES, way)
    if world_size < 1:
        raise bad("all_reduce", "world_size", "be at least 1", world_size)
    return ALL_REDUCES[way](num_bytes, world_size)
