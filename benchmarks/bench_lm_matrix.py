"""Short training runs of one language model: every attention kernel with every wrapper.

A batch of its own for every step, drawn within the step, as a training program would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from bench_data_parallel import training_results
from cases import Selection, refuse_unmet
from data_parallel_cases import TrainingCase
from data_parallel_ranks import TrainingResult
from data_parallel_rows import KINDS, counts
from lm_matrix_cases import Matrix
from rank_slot import RankSlot

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.ranks import slowest
from cs336_systems.measure.workload import Workload

# A large model on a CPU takes minutes for an epoch.
_TIMEOUT_S = 3600.0


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every kernel with every wrapper."""
    cases = [] if chosen.matrix is None else chosen.matrix.cases()
    names = "attention, strategy, size, context, batch, ranks, precision"
    return names, [tuple(getattr(case, name) for name in names.split(", ")) for case in cases]


SWEEPS = {"bench_lm_matrix": sweep}


def bench_lm_matrix(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    rank_slot: RankSlot,
    attention: str,
    strategy: str,
    size: str,
    context: int,
    batch: int,
    ranks: int,
    precision: str,
) -> None:
    """Time epochs of training steps; a round's time is a step's, of the slowest rank."""
    matrix = chosen.matrix
    assert matrix is not None
    case = TrainingCase(
        strategy, size, context, batch, ranks, precision, "fp32", attention=attention
    )
    record = replace(
        case.case("lm_matrix", chosen.device),
        rounds=matrix.epochs,
        calls_per_round=matrix.steps(case),
        baseline={"attention": matrix.kernels[0]},
    )

    def build() -> Workload:
        refuse_unmet(attention, chosen.device, precision)
        case.refuse_what_cannot_run(chosen.device)
        backend = "nccl" if chosen.device.type == "cuda" else "gloo"
        results = training_results(
            rank_slot.get(ranks, backend, timeout_s=_TIMEOUT_S),
            case,
            data=matrix.data,
            rounds=matrix.epochs,
            warmup_rounds=record.warmup_rounds,
            steps_per_round=matrix.steps(case),
            max_seconds=gpu_benchmark.harness.settings.max_seconds,
            profiled=False,
        )
        return Workload(
            step=lambda: None,
            replay_seconds=slowest([result.seconds for result in results]),
            metrics=lambda: run_metrics(matrix, case, results),
            count=lambda: counts(case, results),
            facts={"setting": matrix.said(case)},
        )

    gpu_benchmark(record, build=build)


def run_metrics(
    matrix: Matrix, case: TrainingCase, results: Sequence[TrainingResult]
) -> dict[str, float | None]:
    """Return a run's numbers: an epoch's time, its losses, the memory of the neediest rank."""
    step_seconds = median(slowest([result.seconds for result in results]))
    losses = results[0].losses
    assert losses is not None
    found: dict[str, float | None] = {
        # All wrappers see the same tokens in an epoch, so the last step's may be part of a batch.
        "epoch_s": step_seconds * matrix.epoch_steps / case.ranks,
        "first_loss": losses.first,
        "last_loss": losses.last,
        "validation_loss": losses.validation,
        **step_memory(results),
    }
    return {name: value for name, value in found.items() if value is not None}


def step_memory(results: Sequence[TrainingResult]) -> dict[str, float | None]:
    """Return the memory of a whole step on the rank that needs most, by what it holds.

    On a CPU, which counts no allocations, it is what stays from step to step.
    """
    most = max(results, key=lambda result: (result.step_peak_bytes or 0, _held(result)))
    held = most.phases["after_step"].held
    parts = {f"memory_{kind}_bytes": held[kind] for kind in KINDS if kind != "activations"}
    if most.step_peak_bytes is None:
        return {**parts, "memory_bytes": _held(most)}
    temporary = max(0, most.step_peak_bytes - _held(most))
    return {
        **parts,
        "memory_activations_bytes": temporary,
        "memory_bytes": most.step_peak_bytes,
        "peak_bytes": most.step_peak_bytes,
    }


def _held(result: TrainingResult) -> int:
    held = result.phases["after_step"].held
    return sum(held[kind] or 0 for kind in KINDS if kind != "activations")
