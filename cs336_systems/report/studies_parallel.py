"""How the studies of several processes are shown."""

from __future__ import annotations

from cs336_systems.report.spec import Listing, Pivot, Plot, Study

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

_SETTING = ("size", "context", "batch", "precision", "communication")
_PHASES = {
    "init": "after the model and optimizer are built",
    "before_step": "before the first optimizer step",
    "after_step": "after the first optimizer step",
}
_KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "communication": "communication",
    "activations": "activations, temporary",
}
_COSTS = (
    "median_ms",
    "metrics.exposed_ms",
    "metrics.over_none",
    "metrics.over_peer",
    "tokens_per_s",
    "share_of_peak",
    "metrics.communication_ms",
    "metrics.unhidden_ms",
    "metrics.gather_wait_ms",
    "counts.collectives",
    "counts.wire_bytes",
    "peak_gib",
)


def _memory(phase: str, *, predicted: bool) -> Plot:
    """Return the picture of one point of the first step."""
    return Plot(
        what=f"memory_{phase}",
        kind="stack",
        title=f"Memory {_PHASES[phase]}",
        x="strategy",
        y=f"metrics.{phase}_peak_bytes",
        parts={f"metrics.{phase}_{kind}_bytes": words for kind, words in _KINDS.items()},
        beside="metrics.predicted_held_bytes" if predicted else None,
        rows=("ranks", *_SETTING),
        log_y=False,
    )


def _memory_listing(phase: str) -> Listing:
    names = (*_KINDS, "peak", "held")
    values = tuple(f"metrics.{phase}_{name}_bytes" for name in names)
    predicted = ("metrics.predicted_held_bytes",) if phase == "after_step" else ()
    return Listing(title=f"Memory {_PHASES[phase]}", values=values + predicted, unsaid=phase)


_DATA_PARALLEL = Study(
    name="data_parallel",
    title="Training steps on several ranks",
    shows="A whole step: forward, backward, synchronisation, AdamW; each rank has a batch of its "
    "own. A round's time is that of its slowest rank. Time added to a step is held against `none`, "
    "whose ranks train alone; a sharded optimizer has less to do there, so that it may be below "
    "zero. Communication, and what of it nothing is computed behind, are of one profiled step on "
    "the rank that communicated least. Memory is that of the rank that needs most; activations are "
    "what is left of its peak. Tokens are those of all ranks, FLOP/s those of each.",
    index=("strategy", "ranks", *_SETTING),
    listings=(
        Listing(title="Steps", values=_COSTS),
        *(_memory_listing(phase) for phase in _PHASES),
    ),
    pivots=(
        Pivot(title="Median ms by ranks", rows=(*_SETTING, "strategy"), columns="ranks"),
        Pivot(
            title="Tokens/s of all ranks",
            rows=(*_SETTING, "strategy"),
            columns="ranks",
            value="tokens_per_s",
        ),
    ),
    plots=(
        Plot(
            what="step_time",
            kind="bars",
            title="Time of a training step",
            x="strategy",
            y="median_ms",
            series=("ranks",),
            rows=_SETTING,
            log_y=False,
        ),
        _memory("init", predicted=False),
        _memory("before_step", predicted=False),
        _memory("after_step", predicted=True),
        Plot(
            what="timeline",
            kind="timeline",
            title="One step of rank 0",
            y="timeline",
            series=("strategy",),
            rows=("ranks", *_SETTING),
        ),
        Plot(
            what="scaling",
            kind="lines",
            title="Tokens/s of all ranks",
            x="ranks",
            y="tokens_per_s",
            series=("strategy",),
            rows=_SETTING,
            log_y=False,
        ),
    ),
)

_BUCKETS = Study(
    name="data_parallel_buckets",
    title="Bucket sizes",
    shows="Time that communication adds to a step, by the size of the buckets that gradients "
    "travel in, beside s / (n w) + n o for n buckets: s bytes of gradients, w the rate of a "
    "large all-reduce and o the time of one without size, both timed on the same ranks. The "
    "model takes a bucket to be computed in the time that it is sent in.",
    index=("strategy", "bucket_mb", "ranks", *_SETTING),
    listings=(
        Listing(
            title="Bucket sizes",
            values=(
                "median_ms",
                "metrics.exposed_ms",
                "metrics.predicted_exposed_ms",
                "metrics.unhidden_ms",
                "metrics.over_peer",
                "metrics.best_bucket_mb",
                "metrics.call_us",
                "metrics.link_gb_per_s",
                "counts.collectives",
            ),
        ),
    ),
    plots=(
        Plot(
            what="added",
            kind="lines",
            title="Time that communication adds to a step",
            x="bucket_mb",
            y="metrics.exposed_ms",
            series=("strategy",),
            rows=_SETTING,
            columns=("ranks",),
            log_x=True,
            log_y=False,
            beside="metrics.predicted_exposed_ms",
        ),
    ),
)

_PROBLEM = ("scaling", "size", "context", "precision", "communication")


def _over_ranks(what: str, title: str, value: str) -> Plot:
    return Plot(
        what=what,
        kind="lines",
        title=title,
        x="ranks",
        y=value,
        series=("strategy",),
        rows=_PROBLEM,
        log_x=True,
        log_y=False,
    )


_SCALING = Study(
    name="scaling",
    title="Weak and strong scaling",
    shows="Training steps on more and more ranks. Weak: every rank keeps its batch. Strong: ranks "
    "divide the batch of one. Speed-up is tokens/s of all ranks over those of one rank alone "
    "(`none` on 1), efficiency is that over the number of ranks. `none` on several ranks does not "
    "communicate: what it loses is not communication's fault. Predicted: as long as `none` on as "
    "many ranks, or as what is sent needs at the rate of a large all-reduce on these links, "
    "whichever is longer; a peer's messages are not counted.",
    index=("scaling", "strategy", "ranks", "size", "context", "batch", "precision"),
    listings=(
        Listing(
            title="Steps",
            values=(
                "median_ms",
                "metrics.predicted_ms",
                "metrics.speedup",
                "metrics.efficiency",
                "metrics.over_none",
                "metrics.over_peer",
                "tokens_per_s",
                "metrics.communication_ms",
                "metrics.predicted_communication_ms",
                "metrics.unhidden_ms",
                "counts.wire_bytes",
                "peak_gib",
            ),
        ),
    ),
    pivots=(
        Pivot(title="Median ms by ranks", rows=(*_PROBLEM, "strategy"), columns="ranks"),
        Pivot(
            title="Efficiency by ranks",
            rows=(*_PROBLEM, "strategy"),
            columns="ranks",
            value="metrics.efficiency",
        ),
    ),
    plots=(
        _over_ranks(
            "efficiency", "Tokens/s of a rank over those of one alone", "metrics.efficiency"
        ),
        _over_ranks("tokens", "Tokens/s of all ranks", "tokens_per_s"),
    ),
)

PARALLEL_STUDIES = (_ALL_REDUCE, _DATA_PARALLEL, _BUCKETS, _SCALING)
