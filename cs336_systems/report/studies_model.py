"""How the studies of the language model are shown."""

from __future__ import annotations

from cs336_systems.report.spec import Pivot, Plot, Study

_MODEL_VARIANT = ("precision", "compile")
_MODEL_POINT = ("size", "context", *_MODEL_VARIANT, "pass")

_MODEL_PASS = Study(
    name="model_pass",
    title="Passes of the language model",
    shows="How long each pass of the model takes, by size, context, precision and compilation.",
    index=_MODEL_POINT,
    pivots=(
        Pivot(
            title="Median ms per pass", rows=("size", "context", *_MODEL_VARIANT), columns="pass"
        ),
    ),
    plots=(
        Plot(
            what="time_by_size",
            kind="bars",
            title="Step time by model size",
            x="size",
            y="median_ms",
            series=_MODEL_VARIANT,
            rows=("pass",),
            fullest="context",
        ),
        Plot(
            what="time_by_context",
            kind="lines",
            title="Step time by context length",
            x="context",
            y="median_ms",
            series=("size",),
            rows=_MODEL_VARIANT,
            columns=("pass",),
            ends=_MODEL_VARIANT,
            log_x=True,
            log_y=True,
        ),
        Plot(
            what="share_of_peak",
            kind="bars",
            title="Share of the device's peak rate",
            x="size",
            y="share_of_peak",
            series=_MODEL_VARIANT,
            rows=("pass",),
            fullest="context",
            log_y=False,
        ),
        Plot(
            what="peak_memory",
            kind="bars",
            title="Peak memory by model size",
            x="size",
            y="peak_gib",
            series=_MODEL_VARIANT,
            rows=("pass",),
            fullest="context",
            log_y=False,
        ),
    ),
)

_WARMUP = Study(
    name="warmup",
    title="Warm-up",
    shows="What the timed rounds look like after 0, 1, 2 or 5 untimed ones.",
    index=(*_MODEL_POINT, "warmup"),
    plots=(
        Plot(
            what="rounds",
            kind="rounds",
            title="Timed rounds in order",
            y="data_ms",
            series=("warmup",),
            rows=("size", "context", *_MODEL_VARIANT),
            columns=("pass",),
        ),
        Plot(
            what="mean",
            kind="spread",
            title="Mean ± standard deviation of the timed rounds",
            x="warmup",
            y="mean_ms",
            series=("warmup",),
            rows=("size", "context", *_MODEL_VARIANT),
            columns=("pass",),
            log_y=False,
        ),
    ),
)

_TRAIN_LOOP = Study(
    name="train_loop",
    title="The training loop's own steps",
    shows="Steps of the loop, with its data, schedule and log, beside the bare step of the model.",
    index=(*_MODEL_POINT, "how"),
    pivots=(
        Pivot(title="Median ms per step", rows=("size", "context", *_MODEL_VARIANT), columns="how"),
    ),
    plots=(),
)

MODEL_STUDIES = (_MODEL_PASS, _WARMUP, _TRAIN_LOOP)
