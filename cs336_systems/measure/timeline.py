"""What a device did during one step, from torch's profiler: computing, communicating, or waiting.

On a GPU these are its kernels and copies: NCCL's are communication, and all on the stream where
gradients are averaged that travel by copy engines; all others compute. Without one, compute is the
time inside of operators and communication that from a call of gloo to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cs336_systems.measure.intervals import (
    Interval,
    coarser,
    duration,
    pack,
    union,
    waited,
    within,
    without,
)

# The kernel of `torch.cuda._sleep`, which stands on the compute stream where a step begins.
_GPU_MARK = "spin_kernel"
_CPU_MARK = "cs336_systems::step"
# What `parallel.peer_average` runs, on the stream of the copies that are its messages.
_EXCHANGE = "_average_kernel"
_GATHERS = ("allgather", "all_gather")
_MOST_INTERVALS = 300
"""Of one lane in JSON: about as many as a picture can show."""


@dataclass(kw_only=True)
class Timeline:
    """Intervals of one step on one rank, in milliseconds since its beginning."""

    step_ms: float
    compute: list[Interval] = field(default_factory=list)
    communication: list[Interval] = field(default_factory=list)
    gathers: list[Interval] = field(default_factory=list)
    """Those of the communication that are all-gathers, each by itself."""

    @property
    def communication_ms(self) -> float:
        """How long something was communicated."""
        return duration(self.communication)

    @property
    def unhidden_ms(self) -> float:
        """How long something was communicated and nothing computed."""
        return duration(without(self.communication, self.compute))

    @property
    def gather_wait_ms(self) -> float:
        """How long computing stood still until an all-gather had ended."""
        return waited(self.compute, self.gathers, (0.0, self.step_ms))

    def lanes(self) -> dict[str, str]:
        """Return the step's lanes as `pack` writes them, short enough for JSON."""
        kinds = {"compute": self.compute, "communication": self.communication}
        return {name: pack(coarser(found, _MOST_INTERVALS)) for name, found in kinds.items()}


def step_timeline(step: Callable[[], object], device: torch.device) -> Timeline | None:
    """Run `step` three times without a break, and return what happened in the second.

    Its neighbours are there for what one step leaves to the next, such as a send that goes on.
    Returns: None where the profiler saw no such step.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        step()
        if on_gpu:
            torch.cuda._sleep(1)
            step()
            torch.cuda._sleep(1)
        else:
            with record_function(_CPU_MARK):
                step()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return read_events(list(profiler.events() or ()), on_gpu=on_gpu)


def read_events(events: list[Any], *, on_gpu: bool) -> Timeline | None:
    """Sort the profiler's events of the marked step into lanes."""
    # A profiler shows its user's ranges on the device too, where they cover several kernels.
    kind = "CUDA" if on_gpu else "CPU"
    own = [event for event in events if event.device_type.name == kind]
    window = _window(own, on_gpu=on_gpu)
    if window is None:
        return None
    exchanging = {event.device_resource_id for event in own if _EXCHANGE in event.name}
    compute, communication, gathers = [], [], []
    for event in own:
        name = event.name.lower()
        interval = (event.time_range.start, event.time_range.end)
        is_sent = "nccl" in name or event.device_resource_id in exchanging
        if name.startswith("gloo:") or (on_gpu and is_sent):
            communication.append(interval)
            if any(word in name for word in _GATHERS):
                gathers.append(interval)
        elif (on_gpu and _GPU_MARK not in name) or name.startswith("aten::"):
            compute.append(interval)
    return Timeline(
        step_ms=(window[1] - window[0]) / 1e3,
        compute=union(_moved(compute, window)),
        communication=union(_moved(communication, window)),
        gathers=_moved(gathers, window),
    )


def _window(events: list[Any], *, on_gpu: bool) -> Interval | None:
    """Return the begin and the end of the marked step on the profiler's clock."""
    if on_gpu:
        marks = sorted(event.time_range.end for event in events if _GPU_MARK in event.name)
        return (marks[0], marks[1]) if len(marks) == 2 else None
    marked = [event.time_range for event in events if event.name == _CPU_MARK]
    return (marked[0].start, marked[0].end) if len(marked) == 1 else None


def _moved(intervals: list[Interval], window: Interval) -> list[Interval]:
    """Return what lies inside a window of microseconds, in milliseconds since it began."""
    return [
        ((begin - window[0]) / 1e3, (end - window[0]) / 1e3)
        for begin, end in within(intervals, window)
    ]
