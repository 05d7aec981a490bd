"""The studies that have a specification, and the order of their parameters' values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cs336_systems.parallel import STRATEGIES
from cs336_systems.report.frame import Row, param_column
from cs336_systems.report.spec import Study
from cs336_systems.report.studies_attention import ATTENTION_STUDIES
from cs336_systems.report.studies_experiments import EXPERIMENT_STUDIES
from cs336_systems.report.studies_model import MODEL_STUDIES
from cs336_systems.report.studies_parallel import PARALLEL_STUDIES

# Values with an order of their own; others sort as numbers, then as words.
_ORDER: dict[str, tuple[str, ...]] = {
    "strategy": tuple(STRATEGIES),
    "scaling": ("weak", "strong"),
    "ratio": ("N_q = N_k", "N_q = 2 N_k", "N_k = 2 N_q"),
    "size": ("tiny", "debug", "small", "medium", "large", "xl", "2.7b", "8b"),
    "precision": ("fp32", "tf32", "fp16", "bf16"),
    "dtype": ("fp32", "tf32", "fp16", "bf16"),
    "compile": ("eager", "blocks", "model"),
    "pass": ("forward", "backward", "forward_backward", "optimizer", "full_step"),
}
_WORDS = {"forward_backward": "forward + backward", "full_step": "full step"}


_TABLES_ONLY = (
    Study(
        name="encoding",
        title="Encoding a corpus",
        shows="Text into token files by the pipeline, beside the `tokenizers` library in memory.",
        index=("encoder", "megabytes"),
        plots=(),
    ),
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

STUDIES = {
    study.name: study
    for study in (
        *MODEL_STUDIES,
        *ATTENTION_STUDIES,
        *PARALLEL_STUDIES,
        *EXPERIMENT_STUDIES,
        *_TABLES_ONLY,
    )
}


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


def further(index: Sequence[str], named: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return the parameters that tell cases apart which those named do not.

    A parameter that the others settle, such as the batch size of a named shape, is none of them.
    """
    telling = list(named)
    for param in index:
        if param not in telling:
            with_it = {(*(row.get(name) for name in telling), row.get(param)) for row in rows}
            without = {tuple(row.get(name) for name in telling) for row in rows}
            if len(with_it) > len(without):
                telling.append(param)
    return telling[len(named) :]


def order_key(param: str, value: Any) -> tuple[int, float, str]:
    """Return the sort key of a parameter's value: tiny before small, 128 before 1024."""
    known = _ORDER.get(param, ())
    if value is None:
        return (3, 0.0, "")
    if value in known:
        return (0, float(known.index(value)), "")
    if isinstance(value, int | float):
        return (1, float(value), "")
    # Numbers within words by their size: D64 before D128.
    return (2, 0.0, re.sub(r"\d+", lambda digits: digits[0].zfill(12), str(value)))


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
