"""Benchmark files in, checked entries out; one line names the file and the key that is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cs336_systems.errors import UsageError, bad
from cs336_systems.measure.intervals import unpack
from cs336_systems.measure.record import SCHEMA, Cache, Clock, Status
from cs336_systems.report.source import Source, read_source
from cs336_systems.report.value import Value

_POSITIVE_STATS = ("mean", "median", "min", "max", "q1", "q3")
# A study names files, so it must not be able to name a folder.
_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checked case: its record, and its statistics in seconds where it was timed."""

    record: dict[str, Any]
    stats: dict[str, Any] | None
    fullname: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """One checked file."""

    source: Source
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]


def load_document(path: Path) -> Document:
    """Read and check one benchmark JSON, or the journal of a run that was interrupted.

    Raises: UsageError, one line naming the file and the key.
    """
    file, text = str(path), _read_text(path)
    warnings: list[str] = []
    if path.suffix == ".jsonl":
        head, values = _journal(file, text, warnings)
    else:
        head = Value(file, "", _parse(file, text))
        values = None
    _check_head(head)
    pairs = values if values is not None else _document_values(head)
    entries = tuple(_entry(kind, value, warnings) for kind, value in pairs)
    if not entries:
        raise bad(f"report: {file}", "the file", "hold at least one case", 0)
    return Document(source=read_source(path, head), entries=entries, warnings=tuple(warnings))


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"report: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"report: {path}: must hold JSON, got bytes that are not UTF-8") from None
    if not text.strip():
        raise UsageError(f"report: {path}: must hold JSON, got an empty file")
    return text


def _parse(file: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Cut off rather than wrong: the text ends where more was needed, or inside a string.
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = "a file that is cut off" if cut else error.msg
        where = f"line {error.lineno} column {error.colno}"
        raise UsageError(f"report: {file}: must hold JSON, got {what} at {where}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"report: {file}: must hold JSON, got {error}") from None


def _check_head(head: Value) -> None:
    if not isinstance(head.raw, dict) or "machine_info" not in head.raw:
        raise UsageError(
            f"report: {head.file}: must be pytest-benchmark JSON, got JSON of another shape"
        )
    if head["cs336_systems"].absent:
        raise UsageError(
            f"report: {head.file}: cs336_systems must be present, "
            "got pytest-benchmark JSON of another suite"
        )
    head["cs336_systems"]["schema"].one_of([SCHEMA])


def _document_values(head: Value) -> Iterator[tuple[str, Value]]:
    for value in head["benchmarks"].elements():
        yield "benchmark", value
    rows = head["cs336_systems"]["rows"]
    for value in () if rows.absent else rows.elements():
        yield "row", value


def _journal(file: str, text: str, warnings: list[str]) -> tuple[Value, list[tuple[str, Value]]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    values: list[Value] = []
    for number, line in lines:
        try:
            values.append(Value(file, f"line {number}: ", json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number != lines[-1][0] or not values:
                what = f"{type(error).__name__}: {error}"
                raise UsageError(
                    f"report: {file}: line {number} must hold JSON, got {what}"
                ) from None
            warnings.append(f"report: {file}: line {number} is cut off and left out")
    head, *rest = values
    return Value(file, "", head.raw), [_journal_value(value) for value in rest]


def _journal_value(line: Value) -> tuple[str, Value]:
    for kind in ("benchmark", "row"):
        if isinstance(line.raw, dict) and kind in line.raw:
            return kind, Value(line.file, f"{line.key}{kind}", line.raw[kind])
    raise Value(line.file, line.key.rstrip(": "), line.raw).must("hold a benchmark or a row")


def _entry(kind: str, value: Value, warnings: list[str]) -> Entry:
    timed = kind == "benchmark"
    record = value["extra_info"] if timed else value
    _check_record(record)
    if timed:
        record["status"].one_of(["ok"])
        _check_stats(value["stats"])
    for name, metric in record["metrics"].fields():
        number = metric.any_number()
        if number is not None and number != number:
            warnings.append(f"report: {metric.file}: {metric.key} is not a number and left out")
            record["metrics"].mapping()[name] = None
    fullname = value["fullname"].text_or_none() or ""
    return Entry(record=record.raw, stats=value["stats"].raw if timed else None, fullname=fullname)


def _check_record(record: Value) -> None:
    record["schema"].one_of([SCHEMA])
    study = record["study"]
    if not _STUDY.fullmatch(study.text()):
        raise study.must("be made of letters, digits, '_', '-' and '.'")
    record["case"].mapping()
    for params in (record["case"], record["baseline"]):
        for _, value in params.fields():
            value.scalar()
    record["status"].one_of(get_args(Status))
    record["clock"].one_of(get_args(Clock))
    record["cache"].one_of(get_args(Cache))
    record["device"].text()
    for name in ("reason", "flops_dtype"):
        record[name].text_or_none()
    for name in ("tokens", "flops", "least_bytes"):
        record[name].number_or_none()
    for name in ("rounds", "warmup_rounds", "calls_per_round"):
        if not record[name].absent:
            record[name].integer()
    if not record["conditions"].absent:
        record["conditions"].mapping()
    for _, value in record["counts"].fields():
        value.integer()
    for _, value in record["facts"].fields():
        value.text()
    for _, value in record["timeline"].fields():
        _check_lane(value)


def _check_lane(value: Value) -> None:
    """Refuse a lane that holds anything but intervals; one that stayed empty is none."""
    rule = "be begins and ends in order, as in '0.5:1.25 2:3'"
    try:
        intervals = unpack(value.raw)
    except (AttributeError, ValueError):
        raise value.must(rule) from None
    ends = [moment for interval in intervals for moment in interval]
    if not all(math.isfinite(moment) for moment in ends) or ends != sorted(ends):
        raise value.must(rule)


def _check_stats(stats: Value) -> None:
    for name in _POSITIVE_STATS:
        stats[name].number()
    stats["stddev"].number(zero=True)
    if stats["rounds"].integer() < 1:
        raise stats["rounds"].must("be at least 1")
    if not stats["data"].absent:
        for sample in stats["data"].elements():
            sample.number()
