"""Fused attention: the course's sweep, the shapes that matter, and how far from fp64 it all is.

Every study takes its rows from the attention table; `flash_cases.py` says on which shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
from attention_bench import DTYPES, PASSES, AttentionBench
from cases import Selection, refuse_unmet
from flash_cases import ROUNDS, Point
from host_turns import HostTurns
from model_bench import tf32
from pace import Pace, run_once

from cs336_systems.attention import ATTENTION
from cs336_systems.measure.clock import synchronizer
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.workload import Workload

CALLS_PER_ROUND = 50
"""Enough that a round of the shortest call takes a millisecond."""

Sweep = Callable[[Selection], tuple[str, list[Any]]]


def _sweep(study: str, *passes: str, in_turns: bool = False) -> Sweep:
    """Return a sweep of a study's grid, the passes of one shape after one another.

    in_turns: rows take turns at every shape and pass, so that the GPU is as warm for one as for
    the other.
    """

    def sweep(chosen: Selection) -> tuple[str, list[Any]]:
        grids = [chosen.flash[study]] if study in chosen.flash else []
        points = [
            Point(row, dtype, shape, which)
            for grid in grids
            for row in grid.rows
            for dtype in grid.dtypes
            for shape in grid.shapes
            for which in passes
            if which in chosen.passes
        ]
        if in_turns:
            places = list(dict.fromkeys(point[1:] for point in points))
            points.sort(key=lambda point: places.index(point[1:]))
        return "point", [pytest.param(point, id=str(point)) for point in points]

    return sweep


SWEEPS = {
    "bench_flash_sweep": _sweep("flash_sweep", *PASSES),
    "bench_attention_shapes": _sweep("attention_shapes", "forward", "backward", in_turns=True),
    "bench_attention_host_bound": _sweep(
        "attention_host_bound", "forward", "forward_backward", in_turns=True
    ),
    "bench_attention_fp32": _sweep("attention_fp32", "forward", "forward_backward"),
    "bench_attention_error": _sweep("attention_error", "forward"),
}


def bench_flash_sweep(
    gpu_benchmark: GpuBenchmark, chosen: Selection, pace: Pace, point: Point
) -> None:
    """Time one pass on (1, 1, seq, d), causal: the course's sweep."""
    attention, dtype, shape, which = point
    row = (attention, dtype, shape.d, which)
    params = {"attention": attention, "dtype": dtype, "d": shape.d, "seq": shape.seq, "pass": which}
    baseline = {"attention": "scaled_dot_prod_attention"}

    def build() -> Workload:
        pace.refuse_slow(row, shape.seq)
        workload = inputs(point, chosen, pace).workload(which)
        wait = synchronizer(chosen.device)
        pace.measure(row, shape.seq, lambda: run_once(attention, workload), wait)
        return workload

    gpu_benchmark(point.case("flash_sweep", params=params, baseline=baseline), build=build)


def bench_attention_shapes(
    gpu_benchmark: GpuBenchmark, chosen: Selection, pace: Pace, point: Point
) -> None:
    """Time one pass on a shape that training runs."""
    gpu_benchmark(point.case("attention_shapes"), build=lambda: tried(point, chosen, pace))


def bench_attention_host_bound(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    pace: Pace,
    host_turns: HostTurns,
    point: Point,
) -> None:
    """Time calls that the device finishes sooner than the host launches them, all rows in turns."""
    study = "attention_host_bound"
    settings = gpu_benchmark.harness.settings
    case = point.case(study, clock="wall_ms", cache="warm", calls_per_round=CALLS_PER_ROUND)
    rounds = ROUNDS if settings.device.type == "cuda" else settings.rounds

    def build(one: Point) -> Workload:
        return tried(one, chosen, pace, compiled_for=one[1:3])

    gpu_benchmark(
        case,
        build=lambda: host_turns.workload(
            point, chosen.flash[study].rows, build, settings, rounds=rounds, calls=CALLS_PER_ROUND
        ),
    )


def bench_attention_fp32(
    gpu_benchmark: GpuBenchmark, chosen: Selection, pace: Pace, point: Point
) -> None:
    """Time one pass in fp32 whose products round no inputs to tf32."""
    with tf32(False):
        gpu_benchmark(point.case("attention_fp32"), build=lambda: tried(point, chosen, pace))


def bench_attention_error(
    gpu_benchmark: GpuBenchmark, chosen: Selection, pace: Pace, point: Point
) -> None:
    """Measure the error of output and gradients against fp64, and time the forward pass."""

    def build() -> Workload:
        bench = inputs(point, chosen, pace)
        run_once(point.attention, bench.workload("forward_backward"))
        return replace(bench.workload("forward"), metrics=bench.errors)

    gpu_benchmark(point.case("attention_error", rounds=10), build=build)


def inputs(
    point: Point, chosen: Selection, pace: Pace, compiled_for: Hashable = None
) -> AttentionBench:
    """Return the row with inputs for it.

    compiled_for: for as long as this stays the same, compiled code is kept; the row, dtype and
        shape unless given.
    Raises: NotMeasured where the row cannot run here.
    """
    attention, dtype, shape, _ = point
    refuse_unmet(attention, chosen.device, dtype, shape.d)
    pace.begin(compiled_for or (attention, dtype, shape))
    function = ATTENTION[attention].load()
    return AttentionBench(function, shape[:4], DTYPES[dtype], chosen.device, is_causal=shape.causal)


def tried(point: Point, chosen: Selection, pace: Pace, compiled_for: Hashable = None) -> Workload:
    """Return the pass, having run it once; compiled_for as in `inputs`.

    Raises: NotMeasured where the row cannot run here, or is a peer that raises for this shape.
    """
    workload = inputs(point, chosen, pace, compiled_for).workload(point.which)
    run_once(point.attention, workload)
    return workload
