"""How the studies of several processes are shown."""

from __future__ import annotations

from cs336_systems.report.spec import Pivot, Plot, Study

_ALL_REDUCE = Study(
    name="all_reduce",
    title="All-reduce by message size",
    shows="How long ranks take to add up fp32 messages, and the bandwidth of the busiest link. "
    "A round's time is that of its slowest rank; gloo moves the host's memory, NCCL the GPUs'.",
    index=("backend", "processes", "megabytes"),
    pivots=(
        Pivot(title="Median ms", rows=("backend", "processes"), columns="megabytes"),
        Pivot(
            title="Bus bandwidth in GB/s",
            rows=("backend", "processes"),
            columns="megabytes",
            value="metrics.bus_gb_per_s",
        ),
    ),
    plots=(
        Plot(
            what="bus_bandwidth",
            kind="lines",
            title="Bus bandwidth of all-reduce",
            x="megabytes",
            y="metrics.bus_gb_per_s",
            series=("backend", "processes"),
            log_x=True,
            log_y=True,
        ),
        Plot(
            what="latency",
            kind="lines",
            title="Time of an all-reduce",
            x="megabytes",
            y="median_ms",
            series=("backend", "processes"),
            log_x=True,
            log_y=True,
        ),
    ),
)

PARALLEL_STUDIES = (_ALL_REDUCE,)
