"""When a unit's gradients are averaged: as soon as they are complete, in one order on all ranks.

The order is that of the forward pass, reversed. A unit that is complete before its turn waits, so
that ranks whose data use different weights still agree on what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cs336_systems.parallel.fsdp_flat import FlatShard
from cs336_systems.parallel.fsdp_schedule import Schedule
from cs336_systems.parallel.fsdp_unit import Unit


class Reductions:
    """The trainable units' reductions of one step.

    is_synchronizing: whether the gradients of a backward pass travel, or add up where they are.
    """

    def __init__(
        self, units: Iterable[Unit], schedule: Schedule, is_synchronizing: Callable[[], bool]
    ) -> None:
        self._units = [unit for unit in units if unit.trainable]
        self._schedule = schedule
        self._is_synchronizing = is_synchronizing
        self._entered: dict[Unit, None] = {}
        self._queue: list[Unit] = []
        self._complete: set[Unit] = set()
        self._has_begun = False
        self._last: Unit | None = None
        for unit in self._units:
            unit.watch_gradients(self._on_gradient)

    def expect(self, unit: Unit) -> None:
        """Take note of a call that may lead to gradients."""
        if unit.trainable:
            self._entered.setdefault(unit)

    def _on_gradient(self, unit: Unit, flat: FlatShard, index: int) -> None:
        is_synchronizing = self._is_synchronizing()
        flat.note(index, accumulate=not is_synchronizing)
        if not unit.has_all_gradients(flat, index):
            return
        if unit.is_done_with_its_gradients and unit.depth == 0:
            self._schedule.release(unit)
        if is_synchronizing:
            self._complete.add(unit)
            self._launch_in_turn()

    def _launch_in_turn(self) -> None:
        if not self._queue:
            self._begin_round()
        while self._queue and self._queue[0] in self._complete:
            self._launch(self._queue.pop(0))

    def _begin_round(self) -> None:
        self._queue = list(reversed(self._entered))
        self._has_begun = True

    def _launch(self, unit: Unit) -> None:
        self._complete.discard(unit)
        if self._last is not None:
            # It had this unit's backward pass to get done. Its buffer is reused from here on.
            self._last.wait_reduce()
        self._last = unit
        self._schedule.note("reduce", unit)
        unit.launch_reduce()

    def launch_rest(self) -> None:
        """Start what is left: units with gradients missing, or with some of an earlier pass."""
        if not self._has_begun:
            self._begin_round()
        while self._queue:
            self._launch(self._queue.pop(0))
        for unit in reversed(self._entered):
            if any(flat.has_unsent for flat in unit.trainable):
                self._launch(unit)

    def complete(self) -> None:
        """Put the averages on the shards."""
        for unit in self._units:
            for flat in unit.trainable:
                flat.complete()
            unit.forget_gradients()
        self._entered.clear()
        self._complete.clear()
        self._has_begun, self._last = False, None

    def discard_dropped(self) -> None:
        """Forget gradients that the user has taken away since they arrived."""
        for unit in self._units:
            # A list, since each of them is to be looked at.
            if any([flat.discard_dropped() for flat in unit.trainable]):
                unit.forget_gradients()

    @property
    def is_pending(self) -> bool:
        """Whether gradients arrived that `complete` has not put in place."""
        return any(flat.arrived for unit in self._units for flat in unit.trainable)
