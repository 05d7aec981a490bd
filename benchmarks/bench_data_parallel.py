"""Training steps of every data-parallel strategy, of buckets of several sizes, and on more and more
ranks: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cases import Selection
from data_parallel_cases import ATTENTION, TrainingCase
from data_parallel_ranks import LinkTimes, TrainingResult, link_times, train_rounds
from data_parallel_rows import bucket_prediction, communication_prediction, counts, lanes, metrics
from rank_slot import RankSlot
from token_batches import TokenFiles

from cs336_systems.measure.memory import gib, requested_bytes
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.ranks import slowest
from cs336_systems.measure.workload import NotMeasured, Workload
from cs336_systems.parallel.launch import RankFailedError, RankPool

Further = Callable[[RankPool, TrainingCase, Sequence[TrainingResult]], Mapping[str, float | None]]

_SETTING = "strategy, size, context, batch, ranks, precision, communication"
_NUM_VALUES = _SETTING.count(",") + 1


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every strategy in every setting."""
    cases = [] if chosen.trainings is None else chosen.trainings.cases()
    return _SETTING, [tuple(case)[:_NUM_VALUES] for case in cases]


def sweep_buckets(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every bucket size in every setting, and no communication to compare with."""
    cases = [] if chosen.trainings is None else chosen.trainings.bucket_cases()
    return f"{_SETTING}, bucket_mb", [tuple(case)[: _NUM_VALUES + 1] for case in cases]


def sweep_scaling(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every strategy on every number of ranks, weak and strong, and one rank alone."""
    cases = [] if chosen.trainings is None else chosen.trainings.scaling_cases()
    return f"scaling, {_SETTING}", [(case.scaling, *case[:_NUM_VALUES]) for case in cases]


SWEEPS = {
    "bench_data_parallel": sweep,
    "bench_data_parallel_buckets": sweep_buckets,
    "bench_scaling": sweep_scaling,
}


def bench_data_parallel(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    rank_slot: RankSlot,
    strategy: str,
    size: str,
    context: int,
    batch: int,
    ranks: int,
    precision: str,
    communication: str,
) -> None:
    """Time training steps; a round's time is that of the slowest rank."""
    case = TrainingCase(strategy, size, context, batch, ranks, precision, communication)
    _bench("data_parallel", case, gpu_benchmark, chosen, rank_slot)


def bench_data_parallel_buckets(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    rank_slot: RankSlot,
    strategy: str,
    size: str,
    context: int,
    batch: int,
    ranks: int,
    precision: str,
    communication: str,
    bucket_mb: int | None,
) -> None:
    """Time training steps with one bucket size, beside what the model of buckets says."""
    case = TrainingCase(strategy, size, context, batch, ranks, precision, communication, bucket_mb)
    _bench("data_parallel_buckets", case, gpu_benchmark, chosen, rank_slot, _predicted)


def bench_scaling(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    rank_slot: RankSlot,
    scaling: str,
    strategy: str,
    size: str,
    context: int,
    batch: int,
    ranks: int,
    precision: str,
    communication: str,
) -> None:
    """Time training steps on some of the ranks, beside what the links need for what is sent."""
    case = TrainingCase(
        strategy, size, context, batch, ranks, precision, communication, scaling=scaling
    )
    _bench("scaling", case, gpu_benchmark, chosen, rank_slot, _sent)


def _bench(
    study: str,
    case: TrainingCase,
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    rank_slot: RankSlot,
    further: Further = lambda *_: {},
) -> None:
    assert chosen.trainings is not None
    profiled = chosen.trainings.profiled
    settings = gpu_benchmark.harness.settings
    record = case.case(study, chosen.device)

    def build() -> Workload:
        case.refuse_what_cannot_run(chosen.device)
        pool = rank_slot.get(case.ranks, "nccl" if chosen.device.type == "cuda" else "gloo")
        results = training_results(
            pool,
            case,
            rounds=record.rounds or settings.rounds,
            warmup_rounds=record.warmup_rounds,
            steps_per_round=record.calls_per_round,
            max_seconds=settings.max_seconds,
            profiled=profiled,
        )
        return replayed(case, results, further(pool, case, results), profiled=profiled)

    gpu_benchmark(record, build=build)


def training_results(
    pool: RankPool, case: TrainingCase, *, data: TokenFiles | None = None, **how: Any
) -> list[TrainingResult]:
    """Run the training, on one batch over and over without `data`.

    Raises: NotMeasured where a rank has no memory left; the pool's next call has fresh ranks.
    """
    try:
        return pool.run(train_rounds, replace(case.training, data=data), **how)
    except RankFailedError as error:
        if not any(word in str(error) for word in ("OutOfMemoryError", "can't allocate memory")):
            raise
        wanted = requested_bytes(error)
        reason = f"rank {error.rank} ran out of memory allocating {gib(wanted)}"
        more = {} if wanted is None else {"requested_bytes": float(wanted)}
        raise NotMeasured("oom", reason, **more) from None


def replayed(
    case: TrainingCase,
    results: Sequence[TrainingResult],
    further: Mapping[str, float | None],
    *,
    profiled: bool,
) -> Workload:
    """Return what the ranks measured as a workload that is not run again."""
    found = lanes(results)
    facts = {"attention": ATTENTION}
    if found is None:
        facts["timeline"] = "the profiler saw no step" if profiled else "not asked for"
    return Workload(
        step=lambda: None,
        replay_seconds=slowest([result.seconds for result in results]),
        metrics=lambda: {**metrics(case, results), **further},
        count=lambda: counts(case, results),
        facts=facts,
        timeline=found,
    )


_links: dict[tuple[int, str], list[LinkTimes]] = {}


def _predicted(
    pool: RankPool, case: TrainingCase, _: Sequence[TrainingResult]
) -> dict[str, float | None]:
    """Return the numbers of the model of buckets."""
    return bucket_prediction(case, _links_of(pool))


def _sent(
    pool: RankPool, case: TrainingCase, results: Sequence[TrainingResult]
) -> dict[str, float | None]:
    """Return how long the links need; one rank has none."""
    if case.ranks == 1:
        return {}
    return communication_prediction(case, results, _links_of(pool))


def _links_of(pool: RankPool) -> list[LinkTimes]:
    """Return all-reduces timed once for each number of ranks."""
    key = (pool.world_size, pool.backend)
    if key not in _links:
        _links[key] = pool.run(link_times)
    return _links[key]
