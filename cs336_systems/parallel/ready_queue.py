"""Which reductions may start: strictly in one order, each when all its gradients are there.

The order must be the same on every rank, whatever order a rank's own backward pass takes: a unit
that is ready early waits for those before it.
"""

from __future__ import annotations

from collections.abc import Sequence


class ReadyQueue:
    """Units of parameters, released in order as their last parameter is marked."""

    def __init__(self, units: Sequence[Sequence[int]]) -> None:
        self._unit_of = {index: number for number, unit in enumerate(units) for index in unit}
        self._sizes = [len(unit) for unit in units]
        self.reset()

    def reset(self) -> None:
        """Forget what was marked and released."""
        self._num_awaited = list(self._sizes)
        self._num_released = 0
        self._marked: dict[int, None] = {}

    @property
    def marked(self) -> list[int]:
        """The parameters marked so far, in the order they were."""
        return list(self._marked)

    def __contains__(self, index: int) -> bool:
        return index in self._marked

    def mark(self, index: int) -> range:
        """Note that a parameter's gradient is there; returns the units this releases."""
        assert index not in self._marked
        self._marked[index] = None
        self._num_awaited[self._unit_of[index]] -= 1
        first = self._num_released
        while self._num_released < len(self._sizes) and not self._num_awaited[self._num_released]:
            self._num_released += 1
        return range(first, self._num_released)

    def rest(self) -> range:
        """Release all units that are left."""
        first, self._num_released = self._num_released, len(self._sizes)
        return range(first, self._num_released)
