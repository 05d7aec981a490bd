"""How the experiments' studies are shown: short training runs, and attention on unequal lengths."""

from __future__ import annotations

from cs336_systems.report.spec import Listing, Pivot, Plot, Study

_SETTING = ("size", "context", "batch", "precision", "communication")
_KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "communication": "communication",
    "activations": "activations, temporary",
}


def _by_wrapper(title: str, value: str) -> Pivot:
    return Pivot(title=title, rows=("attention",), columns="strategy", value=value)


def _bars(what: str, title: str, y: str) -> Plot:
    return Plot(
        what=what,
        kind="bars",
        title=title,
        x="attention",
        y=y,
        series=("strategy",),
        rows=_SETTING,
        log_y=False,
    )


_LM_MATRIX = Study(
    name="lm_matrix",
    title="Short training runs by attention kernel and wrapper",
    shows="Whole training steps: a new batch, forward, backward, synchronisation, AdamW. `none` is "
    "one rank alone; with every other wrapper each rank has a batch of its own. All see the same "
    "number of tokens in an epoch, so that n ranks take 1/n of the steps: time per epoch and "
    "tokens/s compare wrappers, time per step does not. A step's time is that of its slowest rank. "
    "Memory is that of the rank that needs most; a CPU counts no activations. FLOP/s are those of "
    "each rank.",
    index=("attention", "strategy", "ranks", *_SETTING),
    listings=(
        Listing(
            title="Runs",
            values=(
                "median_ms",
                "metrics.epoch_s",
                "tokens_per_s",
                "metrics.over_alone",
                "speedup",
                "tflops",
                "share_of_peak",
                "metrics.memory_bytes",
                "metrics.first_loss",
                "metrics.last_loss",
                "metrics.validation_loss",
            ),
        ),
    ),
    pivots=(
        _by_wrapper("DDP speed-up: wall time per epoch in s", "metrics.epoch_s"),
        _by_wrapper("DDP speed-up: tokens/s over those of none (x)", "metrics.over_alone"),
        _by_wrapper("Tokens/s of all ranks", "tokens_per_s"),
        _by_wrapper("Memory of a step", "metrics.memory_bytes"),
    ),
    plots=(
        _bars("time", "Wall time per epoch", "metrics.epoch_s"),
        Plot(
            what="memory",
            kind="stack",
            title="Memory of a training step",
            x="strategy",
            y="metrics.memory_bytes",
            parts={f"metrics.memory_{kind}_bytes": words for kind, words in _KINDS.items()},
            rows=("attention", *_SETTING),
            log_y=False,
        ),
        _bars("throughput", "Tokens/s of all ranks", "tokens_per_s"),
    ),
)

_ATTENTION_SWEEP = Study(
    name="attention_sweep",
    title="Forward attention by numbers of queries and keys",
    shows="Latency of the forward pass alone, N_q queries on N_k keys; a tier is the longer of "
    "the two. Inputs require gradients, as in training, so that a kernel saves what its backward "
    "pass needs. Every case's last rows are held against fp64 before it is timed.",
    index=("attention", "dtype", "d", "tier", "queries", "keys", "ratio"),
    pivots=(
        Pivot(title="Median ms", rows=("tier", "queries", "keys"), columns="attention"),
        Pivot(
            title="Speed-up (x)",
            rows=("tier", "queries", "keys"),
            columns="attention",
            value="speedup",
        ),
        Pivot(
            title="Model TFLOP/s",
            rows=("tier", "queries", "keys"),
            columns="attention",
            value="tflops",
        ),
    ),
    plots=(
        Plot(
            what="forward",
            kind="bars",
            title="Time of forward attention by tier",
            x="tier",
            y="median_ms",
            series=("attention",),
            rows=("ratio",),
            most_panels=3,
        ),
        Plot(
            what="heatmap",
            kind="heatmap",
            title="Speed-up of forward attention",
            x="keys",
            y="speedup",
            series=("queries",),
            columns=("attention",),
            unsaid=("tier", "ratio"),
        ),
        Plot(
            what="scaling",
            kind="lines",
            title="Growth of forward attention with length",
            x="queries",
            y="median_ms",
            series=("attention",),
            columns=("ratio",),
            unsaid=("tier", "keys"),
            log_x=True,
            log_y=True,
            guides=(1, 2),
            most_panels=3,
        ),
    ),
)

EXPERIMENT_STUDIES = (_LM_MATRIX, _ATTENTION_SWEEP)
