"""The course's public harness: its step under its own `do_bench`, for every fused row."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from attention_bench import DTYPES, AttentionBench
from cases import Selection, refuse_unmet
from flash_cases import Point
from pace import Pace, run_once
from torch import Tensor

from cs336_systems.attention import ATTENTION
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.workload import Workload

STUDY = "attention_harness"
WARMUP_MS = 1_000
APPLIED = {
    # Rows that the harness calls as it calls what students hand in: an autograd function's `apply`.
    "flash_attention_triton": "cs336_systems.attention.flash_triton:FlashAttentionTriton",
}


def sweep(chosen: Selection) -> tuple[str, list[Any]]:
    """Every fused row on the harness's one shape."""
    grids = [chosen.flash[STUDY]] if STUDY in chosen.flash else []
    points = [
        Point(row, dtype, shape, "forward_backward")
        for grid in grids
        for row in grid.rows
        for dtype in grid.dtypes
        for shape in grid.shapes
    ]
    return "point", [pytest.param(point, id=str(point)) for point in points]


SWEEPS = {"bench_attention_harness": sweep}


def bench_attention_harness(
    gpu_benchmark: GpuBenchmark, chosen: Selection, pace: Pace, point: Point
) -> None:
    """Time the harness's step by our clock and, as a metric beside it, by its `do_bench`."""
    # On a CPU compiling takes longer than all the rest of a default run, and `do_bench` has no GPU.
    on_gpu = chosen.device.type == "cuda"
    case = point.case(STUDY)
    params = {**case.params, "compile": "function" if on_gpu else "eager"}

    def build() -> Workload:
        refuse_unmet(point.attention, chosen.device, point.dtype, point.shape.d)
        pace.begin((STUDY, point))
        function = harness_function(point.attention)
        flash = torch.compile(function) if on_gpu else function
        step = harness_step(flash, point, chosen.device)
        run_once(point.attention, Workload(step=step))
        metrics = (lambda: do_bench_ms(step, chosen.harness_rep_ms)) if on_gpu else None
        return Workload(
            step=step, check=harness_check(flash, point, chosen.device), metrics=metrics
        )

    gpu_benchmark(point.case(STUDY, params=params), build=build)


Flash = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def harness_function(attention: str) -> Flash:
    """Return a row as the harness calls it: four arguments in order."""
    if attention in APPLIED:
        module, name = APPLIED[attention].split(":")
        function: Flash = getattr(import_module(module), name).apply
        return function
    row = ATTENTION[attention].load()
    return lambda q, k, v, is_causal: row(q, k, v, is_causal=is_causal)


def harness_step(flash: Flash, point: Point, device: torch.device) -> Callable[[], None]:
    """Return the harness's step; q, k and v are parts of one leaf, whose gradient accumulates."""
    q, k, v = torch.randn(
        3, *_size(point), device=device, dtype=DTYPES[point.dtype], requires_grad=True
    )

    def step() -> None:
        flash(q, k, v, point.shape.causal).sum().backward()

    return step


def harness_check(flash: Flash, point: Point, device: torch.device) -> Callable[[], None] | None:
    """Return the check of all attention studies, of the function as the harness calls it."""

    def function(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        return flash(q, k, v, is_causal)

    bench = AttentionBench(
        function, _size(point), DTYPES[point.dtype], device, is_causal=point.shape.causal
    )
    return bench.workload("forward_backward").check


def do_bench_ms(step: Callable[[], None], rep_ms: int) -> dict[str, float | None]:
    """Return the mean that the harness prints."""
    from triton.testing import do_bench

    return {"do_bench_ms": do_bench(step, rep=rep_ms, warmup=WARMUP_MS)}


def _size(point: Point) -> tuple[int, int, int]:
    shape = point.shape
    return shape.batch * shape.heads, shape.seq, shape.d
