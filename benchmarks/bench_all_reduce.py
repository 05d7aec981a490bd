"""All-reduce of fp32 messages between processes of one machine: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

from statistics import median
from typing import Any

from all_reduce_cases import Exchange
from all_reduce_ranks import RankResult, all_reduce_rounds
from cases import Selection
from rank_slot import RankSlot

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.ranks import slowest
from cs336_systems.measure.workload import Workload
from cs336_systems.parallel.traffic import bandwidth, wire_bytes


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every backend with every number of ranks at every size."""
    exchanges = [] if chosen.all_reduce is None else chosen.all_reduce.exchanges()
    return "backend, processes, megabytes", [tuple(exchange) for exchange in exchanges]


SWEEPS = {"bench_all_reduce": sweep}


def bench_all_reduce(
    gpu_benchmark: GpuBenchmark,
    rank_slot: RankSlot,
    backend: str,
    processes: int,
    megabytes: int,
) -> None:
    """Time one all-reduce on all ranks; a round's time is that of the slowest."""
    exchange = Exchange(backend, processes, megabytes)
    case, settings = exchange.case(), gpu_benchmark.harness.settings

    def build() -> Workload:
        exchange.refuse_what_cannot_run()
        results = rank_slot.get(processes, backend).run(
            all_reduce_rounds,
            exchange.num_bytes,
            case.rounds or settings.rounds,
            case.warmup_rounds,
            settings.max_seconds,
        )
        return replayed(exchange, results)

    gpu_benchmark(case, build=build)


def replayed(exchange: Exchange, results: list[RankResult]) -> Workload:
    """Return what the ranks measured as a workload that is not run again."""
    seconds = slowest([result.seconds for result in results])
    call = results[0].call
    rate = bandwidth(call.name, call.num_bytes, call.world_size, median(seconds))
    names = [result.device_name for result in results]
    devices = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return Workload(
        step=lambda: None,
        replay_seconds=seconds,
        metrics=lambda: {
            "bus_gb_per_s": rate.bus / 1e9,
            "algorithm_gb_per_s": rate.algorithm / 1e9,
        },
        count=lambda: {"message_bytes": call.num_bytes, "wire_bytes": round(wire_bytes([call]))},
        facts={"devices": ", ".join(devices)},
    )
