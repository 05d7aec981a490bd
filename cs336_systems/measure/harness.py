"""One case from preparation to record: warm up, check, measure memory, then let pytest-benchmark
time it.

Everything that can fail runs before the first timed round, so that a case has either a complete row
or none. What a case may end as without being timed (out of memory, skipped, not installed) is a row
too.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cs336_systems.errors import bad
from cs336_systems.measure.clock import (
    EventClock,
    PerCallClock,
    ReplayClock,
    WallClock,
    synchronizer,
)
from cs336_systems.measure.device import conditions
from cs336_systems.measure.memory import gib, is_out_of_memory, peak_bytes, release, requested_bytes
from cs336_systems.measure.record import Case, Record
from cs336_systems.measure.workload import NotMeasured, Workload

_HEAD_START_CYCLES = 1_000_000
"""Of the device's clock, half a millisecond: more than a forward and a backward pass of autograd
take to launch."""
LEAST_ROUNDS = 3
"""Timed rounds of a case, however long they take."""
Clock = Callable[[], float]
Timer = Callable[..., None]
"""`timer(clock, step, setup, rounds)`: calls `clock` before and after each of `rounds` calls of
`step`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says about every case."""

    device: torch.device
    rounds: int = 10
    warmup_rounds: int = 5
    max_seconds: float = 30.0
    """Timed rounds of one case stop being added beyond this; at least three are always run."""


@dataclass
class Harness:
    """Runs cases on one device; clock and synchronisation can be replaced to test the harness."""

    settings: Settings
    synchronize: Callable[[], None] | None = None
    _flush: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.synchronize is None:
            self.synchronize = synchronizer(self.settings.device)

    def run(self, case: Case, build: Callable[[], Workload], timer: Timer) -> Record:
        """Prepare and time one case; a case that memory or a missing part rules out still gives
        a record."""
        case = self._resolve(case)
        device = self.settings.device
        try:
            record = self._measure(case, build(), timer)
        except NotMeasured as end:
            record = self._ended(case, end.status, end.reason, end.metrics)
        except Exception as error:
            # A kept traceback would keep the case's tensors alive through its frames' variables.
            traceback.clear_frames(error.__traceback__)
            if not is_out_of_memory(error):
                raise
            record = self._out_of_memory(case, error)
        finally:
            self._flush = None
            release(device)
        return record

    def _resolve(self, case: Case) -> Case:
        on_gpu = self.settings.device.type == "cuda"
        return replace(
            case,
            clock=case.clock if on_gpu else "wall_ms",
            cache=case.cache if on_gpu else "warm",
            rounds=case.rounds or self.settings.rounds,
            warmup_rounds=self.settings.warmup_rounds
            if case.warmup_rounds is None
            else case.warmup_rounds,
        )

    def _measure(self, case: Case, workload: Workload, timer: Timer) -> Record:
        if workload.replay_seconds is not None:
            return self._replay(case, workload, timer)
        assert case.rounds is not None
        step = repeated(workload, case.calls_per_round)
        seconds = self._warm_up(case, workload.setup, step)
        if workload.check is not None:
            workload.check()
        metrics, counts = untimed(workload, self.settings.device)
        rounds = max(
            LEAST_ROUNDS, min(case.rounds, int(self.settings.max_seconds / max(seconds, 1e-9)))
        )
        case = replace(case, rounds=rounds)
        before = conditions(self.settings.device)
        timer(self._clock(case), step, self._round_setup(case, workload), rounds)
        after = conditions(self.settings.device)
        return Record(
            case=case,
            device=self.settings.device.type,
            metrics=metrics,
            counts=counts,
            facts=workload.facts or {},
            conditions={name: [before[name], after[name]] for name in before},
        )

    def _replay(self, case: Case, workload: Workload, timer: Timer) -> Record:
        seconds = list(workload.replay_seconds or ())
        timer(ReplayClock(seconds), _nothing, None, len(seconds))
        return Record(
            case=replace(case, rounds=len(seconds)),
            device=self.settings.device.type,
            metrics=workload.metrics() if workload.metrics else {},
            counts=dict(workload.count() if workload.count else {}),
            facts=workload.facts or {},
            timeline=workload.timeline,
        )

    def _warm_up(
        self, case: Case, setup: Callable[[], object] | None, step: Callable[[], object]
    ) -> float:
        """Run the warm-up rounds and return how long one round with its setup takes."""
        assert case.warmup_rounds is not None
        assert self.synchronize is not None
        seconds = 0.0
        for _ in range(case.warmup_rounds):
            start = time.perf_counter()
            _discard(setup)
            step()
            self.synchronize()
            seconds = time.perf_counter() - start
        return seconds

    def _clock(self, case: Case) -> Clock:
        assert self.synchronize is not None
        clock = EventClock() if case.clock == "gpu_ms" else WallClock(self.synchronize)
        return clock if case.calls_per_round == 1 else PerCallClock(clock, case.calls_per_round)

    def _round_setup(self, case: Case, workload: Workload) -> Callable[[], None] | None:
        if case.cache == "warm":
            return None if workload.setup is None else lambda: _discard(workload.setup)

        def setup() -> None:
            _discard(workload.setup)
            self._flush_cache()

        return setup

    def _flush_cache(self) -> None:
        """Overwrite the device's L2 cache, then keep the device busy while the host launches.

        Of a call that is shorter than its launches, launching would be measured otherwise.
        """
        if self._flush is None:
            l2_bytes = torch.cuda.get_device_properties(self.settings.device).L2_cache_size
            size = max(256 * 2**20, 4 * l2_bytes)
            self._flush = torch.empty(size, dtype=torch.uint8, device=self.settings.device)
        self._flush.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)

    def _out_of_memory(self, case: Case, error: Exception) -> Record:
        wanted = requested_bytes(error)
        reason = f"ran out of memory allocating {gib(wanted)}"
        metrics = {} if wanted is None else {"requested_bytes": float(wanted)}
        return self._ended(case, "oom", reason, metrics)

    def _ended(self, case: Case, status: Any, reason: str, metrics: Mapping[str, float]) -> Record:
        return Record(
            case=case,
            device=self.settings.device.type,
            status=status,
            reason=reason,
            metrics=dict(metrics),
        )


def untimed(
    workload: Workload, device: torch.device
) -> tuple[dict[str, float | None], dict[str, int]]:
    """Return a workload's further metrics, its peak memory among them, and its counts."""
    _discard(workload.setup)
    metrics: dict[str, float | None] = {"peak_bytes": peak_bytes(device, workload.step)}
    metrics.update(workload.metrics() if workload.metrics else {})
    counts: Mapping[str, int] = workload.count() if workload.count else {}
    return metrics, dict(counts)


def repeated(workload: Workload, calls: int) -> Callable[[], object]:
    """Return a call that makes `calls` calls of a workload's step; for one, the step itself.

    Raises: UsageError for several calls with a setup, which belongs before each.
    """
    step = workload.step
    if calls == 1:
        return step
    if workload.setup is not None:
        raise bad("gpu_benchmark", "calls_per_round", "be 1 with a setup", calls)

    def repeat() -> None:
        for _ in range(calls):
            step()

    return repeat


def _nothing() -> None:
    """Stand in for a step whose times are replayed."""


def _discard(function: Callable[[], object] | None) -> None:
    if function is not None:
        function()
