"""Model passes: forward, forward + backward, the full step, and backward and optimizer alone."""

from __future__ import annotations

from typing import Any

from cases import Selection
from model_bench import ModelCase, ModelSlot

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.workload import Workload


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Passes innermost, so that they share a model."""
    compiled_at = chosen.contexts[-1], chosen.precisions[0]
    return "size, context, precision, compile_mode, which", [
        (size, context, precision, mode, which)
        for size in chosen.sizes
        for context in chosen.contexts
        for precision in chosen.precisions
        for mode in chosen.compile_modes
        if mode == "eager" or chosen.compiled_everywhere or (context, precision) == compiled_at
        for which in chosen.passes
    ]


SWEEPS = {"bench_model_pass": sweep}


def bench_model_pass(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    model_slot: ModelSlot,
    size: str,
    context: int,
    precision: str,
    compile_mode: str,
    which: str,
) -> None:
    """Time one pass of one model."""
    case = ModelCase(
        size=size,
        context=context,
        precision=precision,
        compile_mode=compile_mode,
        attention=chosen.attention,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )

    def build() -> Workload:
        case.refuse_what_is_missing()
        case.refuse_what_cannot_fit(which)
        bench = model_slot.get(case, nvtx=chosen.nvtx)
        return bench.workload(which, counted=chosen.gate or chosen.smoke)

    gpu_benchmark(case.record_case("model_pass", which), build=build)
