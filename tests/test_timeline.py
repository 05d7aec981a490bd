"""A step's lanes, from events as torch's profiler gives them and from a real step on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cs336_systems.measure.intervals import unpack
from cs336_systems.measure.timeline import read_events, step_timeline

REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def event(name: str, start: float, end: float, device: str = "CUDA", stream: int = 7) -> Any:
    """Return an event as the profiler's, in microseconds."""
    return SimpleNamespace(
        name=name,
        device_resource_id=stream,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(start=start, end=end),
    )


def intervals(*expected: tuple[float, float]) -> list[Any]:
    """Return what compares with intervals but for rounding."""
    return [pytest.approx(interval) for interval in expected]


STEP = [
    event("gemm", 0, 900),
    event(MARK, 900, 1000),
    event(REDUCE, 800, 1500),  # sent by the step before
    event("gemm", 1000, 2000),
    event(GATHER, 1800, 2600),
    event("cudaLaunchKernel", 1000, 9000, "CPU"),
    event("gemm", 3000, 4000),
    event(REDUCE, 3500, 4500),
    event("adam", 4500, 5000),
    event(MARK, 5000, 5100),
    event("gemm", 5100, 6000),
]


def test_lanes_are_of_the_marked_step() -> None:
    found = read_events(STEP, on_gpu=True)
    assert found is not None
    assert found.step_ms == pytest.approx(4.1)
    assert found.compute == intervals((0.0, 1.0), (2.0, 3.0), (3.5, 4.0))
    assert found.communication == intervals((0.0, 0.5), (0.8, 1.6), (2.5, 3.5))
    assert found.communication_ms == pytest.approx(2.3)
    assert found.unhidden_ms == pytest.approx(0.6 + 0.5)
    assert found.gather_wait_ms == pytest.approx(0.6)
    assert unpack(found.lanes()["communication"]) == [(0.0, 0.5), (0.8, 1.6), (2.5, 3.5)]


def test_copies_beside_the_kernel_that_averages_are_communication() -> None:
    found = read_events(
        [
            event(MARK, 900, 1000),
            event("gemm", 1000, 2000),
            event("Memcpy DtoD (Device -> Device)", 1100, 1300),
            event("Memcpy DtoD (Device -> Device)", 1900, 2400, stream=20),
            event("_average_kernel", 2400, 2500, stream=20),
            event(MARK, 3000, 3100),
        ],
        on_gpu=True,
    )
    assert found is not None
    assert found.compute == intervals((0.0, 1.0))
    assert found.communication == intervals((0.9, 1.5))


@pytest.mark.parametrize("marks", [0, 1, 3])
def test_without_its_marks_there_is_no_step(marks: int) -> None:
    unmarked = [each for each in STEP if each.name != MARK]
    marked = [event(MARK, 10 * number, 10 * number + 1) for number in range(marks)]
    assert read_events([*unmarked, *marked], on_gpu=True) is None


def test_gloo_communicates_and_operators_compute() -> None:
    events = [
        event("cs336_systems::step", 0, 5000, "CPU"),
        event("aten::mm", 0, 1000, "CPU"),
        event("gloo:all_gather", 500, 2000, "CPU"),
        event("c10d::allreduce_", 2000, 2500, "CPU"),
        event("aten::mm", 3000, 9000, "CPU"),
    ]
    found = read_events(events, on_gpu=False)
    assert found is not None
    assert found.compute == intervals((0.0, 1.0), (3.0, 5.0))
    assert found.communication == intervals((0.5, 2.0))
    assert (found.unhidden_ms, found.gather_wait_ms) == pytest.approx((1.0, 1.0))


def test_a_real_step_is_the_second_of_three() -> None:
    calls = []

    def step() -> None:
        calls.append(len(calls))
        torch.mm(torch.ones(200, 200), torch.ones(200, 200))

    found = step_timeline(step, torch.device("cpu"))
    assert calls == [0, 1, 2]
    assert found is not None
    assert found.communication == []
    assert 0 < sum(end - begin for begin, end in found.compute) <= found.step_ms
