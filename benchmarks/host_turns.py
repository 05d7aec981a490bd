"""Rows that take turns at calls which the host decides, so that its mood is the same for all.

A host, a virtual machine above all, may be twice as slow a minute later. Rows that are timed after
one another would be compared by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from flash_cases import Point

from cs336_systems.measure.clock import PerCallClock, WallClock, synchronizer
from cs336_systems.measure.harness import LEAST_ROUNDS, Settings, repeated, untimed
from cs336_systems.measure.workload import Workload

Build = Callable[[Point], Workload]


class HostTurns:
    """The rows of a study on one shape: all are timed when the first is asked for."""

    def __init__(self) -> None:
        self._place: tuple[object, ...] = ()
        self._found: dict[str, Workload | Exception] = {}

    def workload(
        self,
        point: Point,
        rows: Sequence[str],
        build: Build,
        settings: Settings,
        *,
        rounds: int,
        calls: int,
    ) -> Workload:
        """Return the point's rounds, taken while all rows took turns, as a workload that is not
        run again.

        build: makes what is timed of a row; called once for each.
        Raises: what building, checking or running this row raised; others are timed regardless.
        """
        place = (*point[1:], tuple(rows))
        if place != self._place:
            self._found = _measured(point, rows, build, settings, rounds, calls)
            self._place = place
        found = self._found[point.attention]
        if isinstance(found, Exception):
            raise found
        return found


def _measured(
    point: Point, rows: Sequence[str], build: Build, settings: Settings, rounds: int, calls: int
) -> dict[str, Workload | Exception]:
    found: dict[str, Workload | Exception] = {}
    ready: dict[str, Workload] = {}
    for row in rows:
        try:
            ready[row] = _ready(build(point._replace(attention=row)), settings)
        except Exception as error:  # what one row's case ends with is not the other rows'
            found[row] = error
    seconds = take_turns(
        ready,
        synchronizer(settings.device),
        rounds=rounds,
        warmup_rounds=settings.warmup_rounds,
        calls=calls,
        max_seconds=settings.max_seconds,
    )
    for row, workload in ready.items():
        found[row] = replace(workload, replay_seconds=seconds[row])
    return found


def _ready(workload: Workload, settings: Settings) -> Workload:
    """Return the workload with what else is to be recorded of it; an error if it is wrong."""
    if workload.check is not None:
        workload.check()
    metrics, counts = untimed(workload, settings.device)
    return replace(workload, metrics=lambda: metrics, count=lambda: counts)


def take_turns(
    workloads: Mapping[str, Workload],
    synchronize: Callable[[], None],
    *,
    rounds: int,
    warmup_rounds: int,
    calls: int,
    max_seconds: float,
) -> dict[str, list[float]]:
    """Return the seconds of one call of each workload's step, round by round.

    In a round every step is called `calls` times back to back, then waited for; their order turns
    around from round to round. At least three rounds; no further one when they have taken
    `max_seconds` for each step.
    Raises: UsageError for several calls with a setup.
    """
    clock = PerCallClock(WallClock(synchronize), calls)
    steps = {name: repeated(workload, calls) for name, workload in workloads.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    total, budget = 0.0, max_seconds * len(names) / calls
    for at in range(-warmup_rounds, max(rounds, LEAST_ROUNDS)):
        if at >= LEAST_ROUNDS and total > budget:
            break
        for name in names if at % 2 == 0 else reversed(names):
            begun = clock()
            steps[name]()
            seconds = clock() - begun
            if at >= 0:
                taken[name].append(seconds)
                total += seconds
    return taken
