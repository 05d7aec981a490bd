"""Counts that the same code must repeat exactly: operators that a step dispatches, kernels it
launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def count_operators(device: torch.device, closure: Callable[[], object]) -> dict[str, int]:
    """Run `closure` once under torch's profiler and count `operators` (ATen calls) and, on a GPU,
    `kernels`."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as prof:
        closure()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = prof.events()
    counts = {"operators": sum(event.name.startswith("aten::") for event in events)}
    if device.type == "cuda":
        counts["kernels"] = sum(
            event.device_type.name == "CUDA" and not event.name.startswith(("Mem", "gpu_"))
            for event in events
        )
    return counts
