"""What recorded collectives put on the wire, and how fast a measured one was.

Bytes are those that a rank sends when each collective is a ring, as NCCL's are for large messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cs336_systems.errors import bad, unknown
from cs336_systems.parallel.collectives import Collective

_REDUCED_OR_GATHERED = 1  # passes of (n - 1) / n of the message
_PASSES = {
    "all_reduce": 2,
    "reduce_scatter_into": _REDUCED_OR_GATHERED,
    "all_gather_into": _REDUCED_OR_GATHERED,
    # Objects are not counted: their messages have no size here.
    "all_gather_object": _REDUCED_OR_GATHERED,
}
RING = (*_PASSES, "broadcast")


class Traffic(NamedTuple):
    """The collectives of one name, added up."""

    num_calls: int
    message_bytes: int
    """Of the tensors as their callers see them."""
    wire_bytes: float
    """Sent by a rank."""


class Bandwidth(NamedTuple):
    """How fast one collective was, in bytes per second."""

    algorithm: float
    """Of the message: what a caller sees."""
    bus: float
    """Of the busiest link: what can be held against the hardware, whatever the number of ranks."""


def wire_factor(name: str, world_size: int) -> float:
    """Return the bytes that a rank sends for each byte of the whole message.

    All-reduce 2 (n - 1) / n, reduce-scatter and all-gather (n - 1) / n. In a broadcast all ranks
    but the last hand on the whole.
    Source: NCCL-tests, doc/PERFORMANCE.md.
    Raises: UsageError for a collective that is not in `RING`, or no ranks.
    """
    if name not in RING:
        raise unknown("traffic", "collective", RING, name)
    if world_size < 1:
        raise bad("traffic", "world_size", "be at least 1", world_size)
    if name == "broadcast":
        return float(world_size > 1)
    return _PASSES[name] * (world_size - 1) / world_size


def wire_bytes(log: Iterable[Collective]) -> float:
    """Return what a rank sends in all of them."""
    return sum(wire_factor(call.name, call.world_size) * call.num_bytes for call in log)


def traffic(log: Iterable[Collective]) -> dict[str, Traffic]:
    """Return the collectives added up by their names, in order of appearance."""
    total: dict[str, Traffic] = {}
    for call in log:
        before = total.get(call.name, Traffic(0, 0, 0.0))
        total[call.name] = Traffic(
            before.num_calls + 1,
            before.message_bytes + call.num_bytes,
            before.wire_bytes + wire_bytes([call]),
        )
    return total


def bandwidth(name: str, num_bytes: int, world_size: int, seconds: float) -> Bandwidth:
    """Return the bandwidths of a collective that took `seconds`.

    num_bytes: of the whole message; of an all-gather the output, of a reduce-scatter the input.
    Source: NCCL-tests, doc/PERFORMANCE.md.
    Raises: UsageError for a time that is not positive.
    """
    if not seconds > 0:
        raise bad("bandwidth", "seconds", "be positive", seconds)
    algorithm = num_bytes / seconds
    return Bandwidth(algorithm, algorithm * wire_factor(name, world_size))
