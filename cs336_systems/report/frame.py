"""The tidy frame: one row per case, one column per parameter and measure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cs336_systems.report.against_none import add_comparisons
from cs336_systems.report.load import Document, Entry, load_document
from cs336_systems.report.source import Hardware, Source

Row = dict[str, Any]

TIME_COLUMNS = ("median_ms", "mean_ms", "std_ms", "q20_ms", "q80_ms", "min_ms")
_DERIVED = ("tokens_per_s", "tflops", "intensity", "share_of_peak", "peak_gib")
_NUMBERS = (*TIME_COLUMNS, *_DERIVED, "speedup")
_OUTCOME = ("study", "status", "reason")
_CLOCK = ("clock", "cache", "rounds", "warmup_rounds", "calls_per_round")
_TAIL = (
    "speedup", "baseline", "throttle", "device_kind", "device_name", "device_count",
    "power_limit_w", "driver", "cuda", "torch", "triton", "python", "commit", "command",
    "file", "id", "fullname", "data_ms", "case", "source", "hardware", "roof", "timeline",
)  # fmt: skip
_RESERVED = frozenset((*_OUTCOME, *TIME_COLUMNS, *_CLOCK, *_DERIVED, *_TAIL))
# What the frame holds for Python alone; a CSV has the same in plain columns.
_OBJECTS = ("data_ms", "case", "source", "hardware", "roof", "timeline")


@dataclass(frozen=True)
class Frame:
    """The cases of one or many files, and where each came from."""

    cases: pd.DataFrame
    sources: tuple[Source, ...]
    warnings: tuple[str, ...]

    def rows(self) -> list[Row]:
        """Return the cases as dictionaries in which whatever is missing is None."""
        return [
            {str(name): None if missing(value) else value for name, value in row.items()}
            for row in self.cases.to_dict("records")
        ]

    def csv(self, rows: Sequence[Row]) -> str:
        """Return some of the rows as CSV, without columns in which they all hold nothing."""
        table = pd.DataFrame(list(rows), columns=list(self.cases.columns), dtype=object)
        filled = table.drop(columns=list(_OBJECTS)).dropna(axis="columns", how="all")
        return str(filled.to_csv(index=False, lineterminator="\n"))


def load(paths: Iterable[Path | str]) -> Frame:
    """Read files into one frame; of a case measured twice on one hardware, the later stays.

    Raises: UsageError for a file that cannot be used.
    """
    return build([load_document(Path(path)) for path in paths])


def build(documents: Sequence[Document]) -> Frame:
    """Put checked documents into one frame, with the derived columns."""
    warnings = [warning for document in documents for warning in document.warnings]
    kept: dict[tuple[Any, ...], Row] = {}
    replaced: dict[tuple[Path, Path], int] = {}
    for document in documents:
        for entry in document.entries:
            row = _row(entry, document.source)
            key = (row["hardware"].identity(), case_key(row["study"], row["case"]))
            if key in kept:
                pair = (document.source.path, kept[key]["source"].path)
                replaced[pair] = replaced.get(pair, 0) + 1
            kept[key] = row
    for (later, earlier), number in replaced.items():
        cases = f"{number} case{'s' if number > 1 else ''}"
        warnings.append(f"report: {later}: {cases} measured again replace those of {earlier}")
    _add_speedups(kept)
    add_comparisons(list(kept.values()))
    rows = list(kept.values())
    sources = tuple(document.source for document in documents)
    return Frame(cases=_table(rows), sources=sources, warnings=tuple(warnings))


def case_key(study: str, params: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a case in any order of parameters; 1, 1.0 and true differ."""
    return (study, *((name, json.dumps(params[name])) for name in sorted(params)))


def case_id(study: str, params: Mapping[str, Any]) -> str:
    """Return the readable identity of a case: `study[param=value,...]`, parameters by name."""
    return f"{study}[{','.join(f'{name}={params[name]}' for name in sorted(params))}]"


def param_column(name: str) -> str:
    """Return a parameter's column; one named like a column of the frame's own is `case.<name>`."""
    taken = name in _RESERVED or name.partition(".")[0] in ("metrics", "counts", "facts")
    return f"case.{name}" if taken else name


def missing(value: object) -> bool:
    """Whether a cell holds nothing: None, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and value != value)


def _row(entry: Entry, source: Source) -> Row:
    record, kind = entry.record, entry.record["device"].partition(":")[0]
    hardware = source.hardware_of(kind, record["case"])
    case = record["case"]
    row: Row = {
        "study": record["study"],
        "status": record["status"],
        "reason": record.get("reason"),
        **{param_column(name): value for name, value in case.items()},
        **{name: record.get(name) for name in _CLOCK},
        **_times(entry.stats),
        "throttle": _throttle(record.get("conditions") or {}),
        "id": case_id(record["study"], case),
        "fullname": entry.fullname,
        "case": case,
        "source": source,
        "hardware": hardware,
        **_provenance(source, hardware),
    }
    row.update(_rates(row["median_ms"], record, source.peak(kind, record.get("flops_dtype"))))
    row["intensity"] = _intensity(record)
    row["roof"] = source.roof(kind, record.get("flops_dtype"))
    row["peak_gib"] = _gib((record.get("metrics") or {}).get("peak_bytes"))
    if (second := _ratio(row["median_ms"], record)) is not None:
        row["metrics.ratio"] = second
    for group in ("metrics", "counts", "facts"):
        row.update({f"{group}.{name}": value for name, value in (record.get(group) or {}).items()})
    baseline = record.get("baseline")
    row["baseline"] = (
        None if baseline is None else ", ".join(f"{k}={v}" for k, v in baseline.items())
    )
    row["_baseline"] = baseline
    row["timeline"] = record.get("timeline")
    return row


def _times(stats: Mapping[str, Any] | None) -> Row:
    if stats is None:
        return dict.fromkeys(TIME_COLUMNS) | {"data_ms": None}
    data = [seconds * 1e3 for seconds in stats.get("data") or ()]
    # Without the rounds themselves, the quartiles are the nearest that pytest-benchmark keeps.
    low, high = np.quantile(data, (0.2, 0.8)) if data else (stats["q1"] * 1e3, stats["q3"] * 1e3)
    names = {"median_ms": "median", "mean_ms": "mean", "std_ms": "stddev", "min_ms": "min"}
    return {
        **{column: stats[name] * 1e3 for column, name in names.items()},
        "q20_ms": float(low),
        "q80_ms": float(high),
        "rounds": int(stats["rounds"]),
        "data_ms": data or None,
    }


def _rates(median_ms: float | None, record: Mapping[str, Any], peak: float | None) -> Row:
    tokens, flops = record.get("tokens"), record.get("flops")
    if median_ms is None:
        return {"tokens_per_s": None, "tflops": None, "share_of_peak": None}
    rate = None if flops is None else flops / (median_ms / 1e3)
    return {
        "tokens_per_s": None if tokens is None else tokens / (median_ms / 1e3),
        "tflops": None if rate is None else rate / 1e12,
        "share_of_peak": None if rate is None or peak is None else 100 * rate / peak,
    }


def _intensity(record: Mapping[str, Any]) -> float | None:
    """Return FLOPs per byte that must be moved."""
    flops, least_bytes = record.get("flops"), record.get("least_bytes")
    return flops / least_bytes if flops and least_bytes else None


def _ratio(median_ms: float | None, record: Mapping[str, Any]) -> float | None:
    """Return our time over a second opinion on it: `do_bench`, or a delay whose length is known."""
    other = (record.get("metrics") or {}).get("do_bench_ms") or record["case"].get("delay_ms")
    known = isinstance(other, (int, float)) and not isinstance(other, bool) and other > 0
    return median_ms / other if known and median_ms is not None else None


def _gib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**30


def _throttle(conditions: Mapping[str, Any]) -> str | None:
    reasons = conditions.get("throttle")
    found = reasons if isinstance(reasons, list) else [reasons]
    names = {name for text in found if isinstance(text, str) for name in text.split(", ")}
    return ", ".join(sorted(names - {"none", ""})) or None


def _provenance(source: Source, hardware: Hardware) -> Row:
    names = ("driver", "cuda", "torch", "triton", "python")
    return {
        "device_kind": hardware.kind,
        "device_name": hardware.label,
        "device_count": hardware.count,
        "power_limit_w": source.power_limit_watts
        if hardware.kind == source.hardware.kind
        else None,
        **{name: source.version(name) for name in names},
        "commit": source.commit,
        "command": source.command,
        "file": source.path.name,
    }


def _add_speedups(kept: Mapping[tuple[Any, ...], Row]) -> None:
    for (identity, _), row in kept.items():
        baseline, row["speedup"] = row.pop("_baseline"), None
        if baseline is None:
            continue
        params = {**row["case"], **{k: v for k, v in baseline.items() if k in row["case"]}}
        base = kept.get((identity, case_key(row["study"], params)))
        if base is not None and base["median_ms"] and row["median_ms"]:
            row["speedup"] = base["median_ms"] / row["median_ms"]


def _table(rows: Sequence[Row]) -> pd.DataFrame:
    names = dict.fromkeys(name for row in rows for name in row)
    fixed = {*_RESERVED}
    params = [name for name in names if name not in fixed and not _is_measure(name)]
    measures = sorted((name for name in names if _is_measure(name)), key=_measure_rank)
    columns = [*_OUTCOME, *params, *TIME_COLUMNS, *_CLOCK, *_DERIVED, *measures, *_TAIL]
    # Objects first, so that an integer parameter absent from another study stays an integer.
    table = pd.DataFrame(
        [[row.get(name) for name in columns] for row in rows], columns=columns, dtype=object
    )
    numbers = [*_NUMBERS, *(name for name in measures if name.startswith("metrics."))]
    return table.astype(dict.fromkeys(numbers, float))


def _is_measure(name: str) -> bool:
    return name.partition(".")[0] in ("metrics", "counts", "facts") and "." in name


def _measure_rank(name: str) -> int:
    return ("metrics", "counts", "facts").index(name.partition(".")[0])
