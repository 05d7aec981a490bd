"""The harness measures itself: a known delay on both clocks, and one step against triton's
`do_bench`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Selection
from model_bench import ModelCase, ModelSlot

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload

DELAY_MS = 10.0
CROSS_CHECKED = ("large", 1024)


def sweep_delays(chosen: Selection) -> tuple[str, list[Any]]:
    """Both clocks on a GPU; on a CPU there is only the host's."""
    if chosen.gate:
        return "clock", []
    return "clock", ["wall_ms", "gpu_ms"] if chosen.device.type == "cuda" else ["wall_ms"]


def sweep_cross_check(chosen: Selection) -> tuple[str, list[Any]]:
    """The step whose time the acceptance rule names, where its size is swept."""
    size, context = CROSS_CHECKED
    wanted = chosen.device.type == "cuda" and size in chosen.sizes and context in chosen.contexts
    return "which", ["forward", "full_step"] if wanted else []


SWEEPS = {"bench_known_delay": sweep_delays, "bench_cross_check": sweep_cross_check}


def bench_known_delay(gpu_benchmark: GpuBenchmark, chosen: Selection, clock: Any) -> None:
    """Time a delay of exactly ten milliseconds, of the device where there is one."""
    case = Case(
        study="self_check", params={"delay_ms": DELAY_MS, "clock": clock}, clock=clock, cache="cold"
    )
    gpu_benchmark(case, delay(chosen.device, DELAY_MS))


def delay(device: torch.device, milliseconds: float) -> Callable[[], None]:
    """Return a call that keeps `device` busy for a known time."""
    if device.type == "cpu":

        def wait() -> None:
            end = time.perf_counter() + milliseconds / 1e3
            while time.perf_counter() < end:
                pass

        return wait
    from cs336_systems.measure.delay import spin

    elapsed = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: spin(elapsed, milliseconds)


def bench_cross_check(
    gpu_benchmark: GpuBenchmark, chosen: Selection, model_slot: ModelSlot, which: str
) -> None:
    """Time one compiled bf16 step by the harness and, as a metric beside it, by `do_bench`."""
    size, context = CROSS_CHECKED
    case = ModelCase(
        size=size,
        context=context,
        precision="bf16",
        compile_mode="blocks",
        attention=chosen.attention,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )

    def build() -> Workload:
        case.refuse_what_cannot_fit(which)
        workload = model_slot.get(case).workload(which)

        def second_opinion() -> dict[str, float | None]:
            from triton.testing import do_bench

            milliseconds = do_bench(workload.step, warmup=100, rep=3000, return_mode="median")
            return {"do_bench_ms": milliseconds}

        return Workload(step=workload.step, check=workload.check, metrics=second_opinion)

    gpu_benchmark(case.record_case("cross_check", which), build=build)
