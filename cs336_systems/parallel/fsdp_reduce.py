"""When a unit's gradients are averaged: as soon as they are complete, in one order on all ranks.

The order is that of the forward pass, reversed. A unit that is complete before its turn waits, and
one that backward has come by is reduced with what there is, so that ranks whose data use different
weights still agree on what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cs336_systems.parallel.fsdp_gradient import ShardedGradient
from cs336_systems.parallel.fsdp_schedule import Schedule
from cs336_systems.parallel.fsdp_unit import Unit, current_backward


class Reductions:
    """The trainable units' reductions of one step.

    is_synchronizing: whether the gradients of a backward pass travel, or add up where they are.
    """

    def __init__(
        self, units: Iterable[Unit], schedule: Schedule, is_synchronizing: Callable[[], bool]
    ) -> None:
        self._units = [unit for unit in units if unit.gradients]
        self._schedule = schedule
        self._is_synchronizing = is_synchronizing
        self._entered: dict[Unit, None] = {}
        self._queue: list[Unit] = []
        self._complete: set[Unit] = set()
        self._backward: int | None = None
        self._last: Unit | None = None
        schedule.on_step = self._on_step
        for unit in self._units:
            unit.watch_gradients(self._on_gradient)

    def expect(self, unit: Unit) -> None:
        """Take note of a call that may lead to gradients."""
        if unit.gradients:
            self._entered.setdefault(unit)

    def _on_gradient(self, unit: Unit, gradient: ShardedGradient, index: int) -> None:
        is_synchronizing = self._is_synchronizing()
        gradient.note(index, accumulate=not is_synchronizing)
        if not unit.has_all_gradients(gradient, index):
            return
        if unit.is_done_with_its_gradients:
            self._schedule.release_if_last(unit)
        if is_synchronizing:
            self.begin_round()
            self._complete.add(unit)
            self._launch_in_turn()

    def _on_step(self) -> None:
        if self._is_synchronizing():
            if current_backward() != -1:
                self.begin_round()
            self._launch_in_turn(after_step=True)

    def begin_round(self) -> None:
        """Queue all units, once in each backward pass; what is left of one that ended early goes
        on with its queue."""
        backward = current_backward()
        if self._backward is None or backward not in (self._backward, -1):
            self.flush()
            self._backward = backward
            self._queue = list(reversed(self._entered))

    def _launch_in_turn(self, *, after_step: bool = False) -> None:
        while self._queue:
            unit = self._queue[0]
            if unit not in self._complete and not (after_step and self._schedule.is_over(unit)):
                return
            self._launch(self._queue.pop(0))

    def _launch(self, unit: Unit) -> None:
        self._complete.discard(unit)
        if self._last is not None:
            # It had this unit's backward pass to get done. Its buffer is reused from here on.
            self._last.wait_reduce()
        self._last = unit
        self._schedule.note("reduce", unit)
        unit.launch_reduce()

    def flush(self) -> None:
        """Start what backward passes so far have left, with what there is."""
        while self._queue:
            self._launch(self._queue.pop(0))

    def launch_rest(self) -> None:
        """Start all that is left of the step."""
        self.flush()
        for unit in reversed(self._entered):
            if any(gradient.has_unsent for gradient in unit.gradients):
                self._launch(unit)

    def complete(self) -> None:
        """Put the averages on the shards."""
        for unit in self._units:
            for gradient in unit.gradients:
                gradient.complete()
            unit.forget_gradients()
        self._entered.clear()
        self._complete.clear()
        self._backward, self._last = None, None

    def discard_dropped(self) -> None:
        """Forget gradients that the user has taken away since they arrived."""
        for unit in self._units:
            # A list, since each of them is to be looked at.
            if any([gradient.discard_dropped() for gradient in unit.gradients]):
                unit.forget_gradients()

    @property
    def is_pending(self) -> bool:
        """Whether gradients arrived that `complete` has not put in place."""
        return any(gradient.arrived for unit in self._units for gradient in unit.gradients)
