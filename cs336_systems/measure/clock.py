"""The two clocks, shaped as pytest-benchmark timers: called once before, once after a timed call.

`WallClock` is for steps (a millisecond and more): the host's clock, read only when the device is
idle. `EventClock` is for kernels: CUDA events around the call, so that host work before the first
launch is not counted as long as something queued earlier keeps the device busy. `ReplayClock` hands
on times that were taken elsewhere, in another process or on several ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until `device` is idle; a CPU leaves nothing to wait for."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


class WallClock:
    """Seconds on the host's clock, read after the device has finished all that was queued."""

    __name__ = "wall_clock"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize

    def __call__(self) -> float:
        self._synchronize()
        return time.perf_counter()


class EventClock:
    """Seconds of device time between odd and even calls, as a clock that only ever advances.

    The first call of a pair records an event and does not wait: waiting would leave the device
    idle, and the launch of the timed call would be counted as its work.
    """

    __name__ = "event_clock"

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
        else:
            event.synchronize()
            self._elapsed += self._start.elapsed_time(event) / 1e3
            self._start = None
        return self._elapsed


class PerCallClock:
    """Another clock for rounds of several calls: between two readings pass the seconds of one."""

    def __init__(self, clock: Callable[[], float], calls: int) -> None:
        self.__name__ = f"{getattr(clock, '__name__', 'clock')}_per_call"
        self._clock = clock
        self._calls = calls

    def __call__(self) -> float:
        return self._clock() / self._calls


class ReplayClock:
    """Seconds that were measured elsewhere, one pair of calls for each of them."""

    __name__ = "replay_clock"

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = iter(seconds)
        self._elapsed = 0.0
        self._running = False

    def __call__(self) -> float:
        if self._running:
            self._elapsed += next(self._seconds)
        self._running = not self._running
        return self._elapsed
