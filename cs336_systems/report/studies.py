"""What each study shows, as data: its parameters in order, its pivots and its plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cs336_systems.report.frame import Row, param_column

# Values with an order of their own; others sort as numbers, then as words.
_ORDER: dict[str, tuple[str, ...]] = {
    "size": ("tiny", "debug", "small", "medium", "large", "xl", "2.7b", "8b"),
    "precision": ("fp32", "tf32", "fp16", "bf16"),
    "dtype": ("fp32", "tf32", "fp16", "bf16"),
    "compile": ("eager", "blocks", "model"),
    "pass": ("forward", "backward", "forward_backward", "optimizer", "full_step"),
}
_WORDS = {"forward_backward": "forward + backward", "full_step": "full step"}


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A small table of one measure: some parameters down, one across."""

    title: str
    rows: tuple[str, ...]
    columns: str
    per: tuple[str, ...] = ()
    """One table for each combination of these."""
    value: str = "median_ms"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture: what goes along each axis and what splits it into series and panels."""

    what: str
    """The second half of the file's name."""
    kind: Literal["bars", "lines", "rounds", "spread"]
    title: str
    y: str
    x: str = ""
    series: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    """One row of panels for each combination of these."""
    columns: tuple[str, ...] = ()
    """One column of panels for each combination of these."""
    fullest: str | None = None
    """Keep one value of this parameter: that with the most values of `x`, of equals the largest."""
    ends: tuple[str, ...] = ()
    """Of these parameters' combinations keep the first and the last in order."""
    regardless: str | None = None
    """`y` does not depend on this parameter: of its rows keep the one that has it."""
    log_x: bool = False
    log_y: bool | None = None
    """None: where the largest value is many times the smallest."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """How one family of cases is shown."""

    name: str
    title: str
    shows: str
    index: tuple[str, ...] = ()
    pivots: tuple[Pivot, ...] = ()
    plots: tuple[Plot, ...] | None = None
    """None: one line plot where a numeric parameter sweeps."""


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

_TABLES_ONLY = (
    Study(
        name="accumulation",
        title="Accumulating in low precision",
        shows="What a long sum comes to when terms and accumulator are held in different dtypes.",
        index=("variant",),
        plots=(),
    ),
    Study(
        name="autocast_dtypes",
        title="Dtypes under autocast",
        shows="Which dtype each part of a model has inside an autocast region.",
        index=("params", "model", "dtype"),
        plots=(),
    ),
    Study(
        name="self_check",
        title="Self-check of the clocks",
        shows="Known work timed by our own clocks: the ratio says how far they are off.",
        plots=(),
    ),
    Study(
        name="cross_check",
        title="Cross-check against do_bench",
        shows="The same kernels timed by our clock and by Triton's do_bench.",
        plots=(),
    ),
)

STUDIES = {study.name: study for study in (_MODEL_PASS, _WARMUP, _ATTENTION_GRID, *_TABLES_ONLY)}


def study_of(name: str) -> Study:
    """Return how a study is shown; one without a specification gets a generic one."""
    title = name.replace("_", " ").capitalize()
    return STUDIES.get(name) or Study(name=name, title=title, shows=f"All cases of `{name}`.")


def study_names(rows: Iterable[Row]) -> list[str]:
    """Return the studies of the rows: those specified in their order, then others by name."""
    found = {row["study"] for row in rows}
    return [name for name in STUDIES if name in found] + sorted(found - set(STUDIES))


def index_of(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return the parameters' columns: as specified, then the others in order of appearance."""
    present = list(dict.fromkeys(param_column(name) for row in rows for name in row["case"]))
    known = [param_column(name) for name in study.index]
    return [name for name in known if name in present] + [n for n in present if n not in known]


def order_key(param: str, value: Any) -> tuple[int, float, str]:
    """Return the sort key of a parameter's value: tiny before small, 128 before 1024."""
    known = _ORDER.get(param, ())
    if value is None:
        return (3, 0.0, "")
    if value in known:
        return (0, float(known.index(value)), "")
    if isinstance(value, int | float):
        return (1, float(value), "")
    return (2, 0.0, str(value))


def values_of(param: str, rows: Iterable[Row]) -> list[Any]:
    """Return the different values of one parameter in its order."""
    return sorted({row.get(param) for row in rows}, key=lambda value: order_key(param, value))


def combinations_of(params: Sequence[str], rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    """Return the different combinations of some parameters in their order."""
    found = {tuple(row.get(param) for param in params) for row in rows}
    return sorted(found, key=lambda combination: sort_key(params, combination))


def sort_key(params: Sequence[str], values: Sequence[Any]) -> tuple[tuple[int, float, str], ...]:
    """Return the sort key of a combination of values."""
    return tuple(order_key(param, value) for param, value in zip(params, values, strict=True))


def fullest(param: str, across: str, rows: Sequence[Row]) -> Any:
    """Return the value of `param` with most timed values of `across`.

    Of equals the one that most cases were run at, timed or not; of these the largest.
    """
    reach: dict[Any, set[Any]] = {value: set() for value in values_of(param, rows)}
    for row in rows:
        if row["status"] == "ok":
            reach[row.get(param)].add(row.get(across))
    run = Counter(row.get(param) for row in rows)
    return max(reach, key=lambda value: (len(reach[value]), run[value], order_key(param, value)))


def word(value: Any) -> str:
    """Return a parameter's value as tables and plots write it."""
    if value is None:
        return "-"
    return _WORDS.get(value, value) if isinstance(value, str) else str(value)
