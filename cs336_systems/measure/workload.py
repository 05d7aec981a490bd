"""What the harness runs for one case, and the ways in which a case may end without a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cs336_systems.measure.record import Status


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A prepared case: the call to time and all that belongs around it, outside the clock."""

    step: Callable[[], object]
    """The timed call."""
    setup: Callable[[], object] | None = None
    """Run before every call of `step`, e.g. the forward pass when `step` is the backward pass."""
    check: Callable[[], None] | None = None
    """Raises AssertionError when the result is wrong; run after warm-up, so a wrong case gets no
    row."""
    count: Callable[[], Mapping[str, int]] | None = None
    """Numbers that the same code repeats exactly."""
    metrics: Callable[[], Mapping[str, float | None]] | None = None
    """Further measured numbers, unit in the name."""
    facts: Mapping[str, str] | None = None
    """Findings that are words."""
    timeline: Mapping[str, str] | None = None
    """As `Record.timeline`."""
    replay_seconds: Sequence[float] | None = None
    """Round times taken elsewhere (another process, other ranks); `step` is then never called."""


class NotMeasured(Exception):  # noqa: N818 - an outcome that becomes a row, not an error
    """Raised while a case is prepared to end it as a row without a time."""

    def __init__(self, status: Status, reason: str, **metrics: float) -> None:
        super().__init__(f"{status}: {reason}")
        self.status: Status = status
        self.reason = reason
        self.metrics = metrics
