"""What warm-up is for: first steps of a fresh process, timed after 0, 1, 2 and 5 warm-up steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Selection
from model_bench import ModelCase

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.workload import NotMeasured, Workload

ROUNDS = 10
STEPS_SCRIPT = Path(__file__).with_name("cold_start.py")


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every number of warm-up steps for every size, at the first context."""
    return "size, context, warmup", [
        (size, chosen.contexts[0], warmup)
        for size in chosen.warmup_sizes
        for warmup in chosen.warmups
        if not chosen.gate
    ]


SWEEPS = {"bench_warmup": sweep}


def bench_warmup(
    gpu_benchmark: GpuBenchmark, chosen: Selection, size: str, context: int, warmup: int
) -> None:
    """Time full steps in a process of its own, where nothing has been loaded or cached before."""
    case = ModelCase(
        size=size,
        context=context,
        precision="fp32",
        compile_mode="eager",
        attention=chosen.attention,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )

    def build() -> Workload:
        case.refuse_what_cannot_fit("full_step")
        return Workload(step=lambda: None, replay_seconds=_fresh_process(case, warmup))

    gpu_benchmark(case.record_case("warmup", "full_step", warmup=warmup), build=build)


def _fresh_process(case: ModelCase, warmup: int) -> list[float]:
    command = [
        sys.executable,
        str(STEPS_SCRIPT),
        case.size,
        str(case.context),
        str(case.batch_size),
    ]
    command += [str(case.device), case.attention, str(warmup), str(ROUNDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode == 0:
        return list(json.loads(result.stdout.splitlines()[-1]))
    error = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no output"
    if "OutOfMemoryError" in error:
        raise NotMeasured("oom", error)
    raise RuntimeError(f"cold start of {case.size} failed: {error}")
