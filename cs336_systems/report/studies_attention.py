"""How the studies of attention are shown: over lengths, on chosen shapes, against others, in
error."""

from __future__ import annotations

from cs336_systems.report.spec import Pivot, Plot, Study, Versus

_ATTENTION_GRID = Study(
    name="attention_grid",
    title="Attention by sequence length and head dimension",
    shows="Latency of each attention, forward and backward, and the memory held in between.",
    index=("attention", "dtype", "d", "seq", "pass"),
    pivots=(
        Pivot(title="Median ms", rows=("seq",), columns="d", per=("attention", "pass", "dtype")),
    ),
    plots=(
        Plot(
            what="latency",
            kind="lines",
            title="Attention latency",
            x="seq",
            y="median_ms",
            series=("attention", "dtype"),
            rows=("pass",),
            columns=("d",),
            log_x=True,
            log_y=True,
        ),
        Plot(
            what="memory",
            kind="lines",
            title="Memory in use before backward",
            x="seq",
            y="metrics.before_backward_bytes",
            series=("attention", "dtype"),
            columns=("d",),
            regardless="pass",
            log_x=True,
            log_y=True,
        ),
    ),
)

# Lines that run close to another of the same picture; the tables have them.
_HIDDEN = {
    "attention": (
        "vectorized_torch",
        "vectorized_torch_compiled",
        "flash_attention_torch_compiled",
    )
}

_FLASH_SWEEP = Study(
    name="flash_sweep",
    title="Fused attention by sequence length",
    shows="The course's sweep: batch 1, one head, causal, every attention, dtype and pass.",
    index=("attention", "dtype", "d", "seq", "pass"),
    pivots=(
        Pivot(title="Median ms", rows=("d", "seq"), columns="attention", per=("dtype", "pass")),
    ),
    plots=(
        Plot(
            what="latency",
            kind="lines",
            title="Attention latency",
            x="seq",
            y="median_ms",
            series=("attention",),
            rows=("pass",),
            columns=("d",),
            per=("dtype",),
            hide=_HIDDEN,
            log_x=True,
            log_y=True,
        ),
        Plot(
            what="tflops",
            kind="lines",
            title="Attention throughput",
            x="seq",
            y="tflops",
            series=("attention",),
            rows=("pass",),
            columns=("d",),
            per=("dtype",),
            hide=_HIDDEN,
            log_x=True,
            log_y=False,
        ),
        Plot(
            what="roofline",
            kind="roofline",
            title="Attention under the roofline",
            x="intensity",
            y="tflops",
            series=("attention",),
            rows=("pass",),
            columns=("d",),
            per=("dtype",),
            hide=_HIDDEN,
        ),
    ),
)

# What a shape's name spells out.
_SPELLED = ("batch", "heads", "seq", "d", "causal")
_SHAPE_INDEX = ("shape", "dtype", "pass", "attention")


def _versus(time: str = "median_ms") -> Versus:
    # Names of the attention table: the project's own fused rows begin so, no other row does.
    return Versus(param="attention", ours="flash_attention_", rows=("shape", "pass"), time=time)


_AGAINST = Plot(
    what="against",
    kind="bars",
    title="Time of others over ours",
    x="shape",
    y="advantage",
    series=("attention",),
    rows=("ours", "pass"),
    unsaid=_SPELLED,
    versus=True,
    log_y=False,
    line_at=1.0,
)

_ATTENTION_SHAPES = Study(
    name="attention_shapes",
    title="Fused attention on shapes that matter",
    shows="Time and throughput of fused attention on shapes that training runs, beside peers.",
    index=_SHAPE_INDEX,
    versus=_versus(),
    pivots=(
        Pivot(title="Model TFLOP/s", rows=("shape", "pass"), columns="attention", value="tflops"),
        Pivot(
            title="Saved for backward",
            rows=("shape",),
            columns="attention",
            value="counts.saved_bytes",
            where={"pass": "backward"},
        ),
    ),
    plots=(
        Plot(
            what="tflops",
            kind="bars",
            title="Throughput of fused attention",
            x="shape",
            y="tflops",
            series=("attention",),
            unsaid=_SPELLED,
            rows=("pass",),
            log_y=False,
        ),
        _AGAINST,
        Plot(
            what="roofline",
            kind="roofline",
            title="Fused attention under the roofline",
            x="intensity",
            y="tflops",
            series=("attention", "dtype"),
            unsaid=_SPELLED,
            rows=("pass",),
            columns=("d",),
        ),
    ),
)

_HOPPER_LADDER = Study(
    name="hopper_ladder",
    title="What each idea of the Hopper kernels is worth",
    shows="The kernels alone, as shipped and with one thing changed.",
    index=("shape", "pass", "changed"),
    pivots=(
        Pivot(
            title="Model TFLOP/s",
            rows=("shape",),
            columns="changed",
            value="tflops",
            per=("pass", "d"),
        ),
    ),
    plots=(
        Plot(
            what="tflops",
            kind="bars",
            title="Hopper kernels with one thing changed",
            x="shape",
            y="tflops",
            series=("changed",),
            unsaid=_SPELLED,
            rows=("pass", "d"),
            log_y=False,
        ),
    ),
)

_ATTENTION_HARNESS = Study(
    name="attention_harness",
    title="The course's public harness",
    shows="Its step, forward and backward under torch.compile, by its do_bench and by our clock.",
    index=_SHAPE_INDEX,
    versus=_versus("metrics.do_bench_ms"),
    plots=(_AGAINST,),
)

_ATTENTION_HOST_BOUND = Study(
    name="attention_host_bound",
    title="Attention calls that wait for the host",
    shows="Time per call, back to back, on shapes that the device finishes sooner than the host "
    "launches them; rows take turns, round by round.",
    index=_SHAPE_INDEX,
    versus=_versus(),
    plots=(
        Plot(
            what="time",
            kind="bars",
            title="Time per call",
            x="shape",
            y="median_ms",
            series=("attention",),
            unsaid=_SPELLED,
            rows=("pass",),
            log_y=False,
        ),
    ),
)

_ATTENTION_FP32 = Study(
    name="attention_fp32",
    title="Fused attention in fp32",
    shows="Time in fp32 whose products round no inputs to tf32.",
    index=_SHAPE_INDEX,
    versus=_versus(),
    plots=(
        Plot(
            what="time",
            kind="bars",
            title="Time of attention in fp32",
            x="pass",
            y="median_ms",
            series=("attention",),
            unsaid=_SPELLED,
            rows=("shape",),
        ),
    ),
)

_ATTENTION_ERROR = Study(
    name="attention_error",
    title="Error of attention against fp64",
    shows="Largest and root-mean-square error of the output and the three gradients.",
    index=_SHAPE_INDEX,
    pivots=tuple(
        Pivot(
            title=f"{how} error of {name}",
            rows=("shape", "dtype"),
            columns="attention",
            value=f"metrics.{name.lower()}_{how.lower()}_error",
        )
        for how in ("Max", "Rms")
        for name in ("O", "dQ", "dK", "dV")
    ),
    plots=(),
)

ATTENTION_STUDIES = (
    _ATTENTION_GRID,
    _FLASH_SWEEP,
    _ATTENTION_SHAPES,
    _ATTENTION_HARNESS,
    _ATTENTION_HOST_BOUND,
    _ATTENTION_FP32,
    _ATTENTION_ERROR,
    _HOPPER_LADDER,
)
