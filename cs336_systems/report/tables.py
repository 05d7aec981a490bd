"""The tables of one study on one hardware: pivots, all cases, and why some have no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cs336_systems.report import text
from cs336_systems.report.cells import (
    Cell,
    Table,
    cell,
    escape,
    markdown_table,
    param_cell,
    ranks,
    scaled,
    time_cell,
)
from cs336_systems.report.frame import TIME_COLUMNS, Frame, Row
from cs336_systems.report.source import Hardware, stamp
from cs336_systems.report.spec import Listing, Pivot, Study
from cs336_systems.report.studies import (
    combinations_of,
    further,
    index_of,
    sort_key,
    study_names,
    study_of,
    values_of,
    word,
)
from cs336_systems.report.versus import versus_tables

_RATES = ("tokens_per_s", "tflops", "intensity", "share_of_peak", "peak_gib", "speedup")
_SAID = "facts.setting"
"""A sentence that many cases share, which a note says once."""
# Past this many cases a reason names only the first ones.
_NAMED_CASES = 3


@dataclass(frozen=True, kw_only=True)
class Section:
    """One study on one hardware, ready to be written down."""

    study: Study
    hardware: Hardware
    rows: Sequence[Row]
    tables: Sequence[Table]
    notes: Sequence[str]
    stamp: Sequence[str]
    brief_stamp: Sequence[str]
    name: str
    """The stem of its files: the study, with the hardware's slug where several were measured."""

    @property
    def heading(self) -> str:
        """The section's title."""
        return f"{self.study.title} on {self.hardware.label}"


def sections(frame: Frame) -> list[Section]:
    """Return one section for each study on each hardware."""
    rows = frame.rows()
    made = []
    for name in study_names(rows):
        by_device: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["study"] == name:
                by_device.setdefault(row["hardware"].identity(), []).append(row)
        devices = [chosen[0]["hardware"] for chosen in by_device.values()]
        for hardware, chosen in zip(devices, by_device.values(), strict=True):
            stem = f"{name}_{_slug(hardware, devices)}" if len(devices) > 1 else name
            made.append(_section(study_of(name), hardware, chosen, stem))
    return made


def _slug(hardware: Hardware, devices: Sequence[Hardware]) -> str:
    """Return the hardware's slug, numbered where another's is the same."""
    same = [device for device in devices if device.slug == hardware.slug]
    position = same.index(hardware)
    return hardware.slug if position == 0 else f"{hardware.slug}-{position + 1}"


def _section(study: Study, hardware: Hardware, rows: Sequence[Row], name: str) -> Section:
    index = index_of(study, rows)
    rows = sorted(rows, key=lambda row: sort_key(index, [row.get(param) for param in index]))
    pivots = [table for pivot in study.pivots for table in _pivots(pivot, index, rows)]
    lists = [table for listing in study.listings for table in _listing(listing, index, rows)]
    against = [] if study.versus is None else versus_tables(study.versus, index, rows)
    return Section(
        study=study,
        hardware=hardware,
        rows=rows,
        tables=[*against, *lists, *pivots, all_cases(index, rows)],
        notes=[*_measured_notes(rows), *_outcome_notes(rows)],
        stamp=stamp((row["source"] for row in rows), hardware),
        brief_stamp=stamp((row["source"] for row in rows), hardware, brief=True),
        name=name,
    )


def all_cases(index: Sequence[str], rows: Sequence[Row]) -> Table:
    """Return the table with a line per case and every column that holds something."""
    return _table("All cases", _columns(index, rows), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Table:
    renderers = {column: _renderer(column, rows) for column in columns}
    return Table(
        title=title,
        headers=[renderers[column][0] for column in columns],
        numeric=[_numeric(column, rows) for column in columns],
        rows=[[renderers[column][1](row) for column in columns] for row in rows],
    )


def _listing(listing: Listing, index: Sequence[str], rows: Sequence[Row]) -> list[Table]:
    """Return the table, or none where no case has any of its measures."""
    filled = [name for name in listing.values if any(row.get(name) is not None for row in rows)]
    if not filled:
        return []
    telling = [name for name in index if name == index[0] or len(values_of(name, rows)) > 1]
    table = _table(listing.title, [*telling, *filled], rows)
    said = listing.unsaid.replace("_", " ") + " "
    return [replace(table, headers=[name.removeprefix(said) for name in table.headers])]


def _columns(index: Sequence[str], rows: Sequence[Row]) -> list[str]:
    measures = [name for name in rows[0] if name.startswith(("metrics.", "counts.", "facts."))]
    # Peak bytes are already there in GiB.
    measures = [name for name in measures if name not in ("metrics.peak_bytes", _SAID)]
    mixed = [name for name in ("clock", "cache") if len({row[name] for row in rows}) > 1]
    candidates = [*TIME_COLUMNS, "rounds", "warmup_rounds", *_RATES, *measures]
    filled = [name for name in candidates if any(row[name] is not None for row in rows)]
    if "rounds" not in filled and "warmup_rounds" in filled:
        # Nothing was timed, so nothing was warmed up.
        filled.remove("warmup_rounds")
    stopped = any(row["status"] != "ok" for row in rows)
    if stopped and not any(name in TIME_COLUMNS for name in filled):
        # Without any time there is still an outcome to show.
        filled.insert(0, "median_ms")
    return [*index, *mixed, *filled]


def _numeric(column: str, rows: Iterable[Row]) -> bool:
    values = [row.get(column) for row in rows if row.get(column) is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _renderer(column: str, rows: Sequence[Row]) -> tuple[str, Callable[[Row], Cell]]:
    """Return a column's heading and the function that makes its cells."""
    if column in TIME_COLUMNS:
        return text.header(column), lambda row: time_cell(row, column)
    if column.endswith("_bytes") and column.startswith(("metrics.", "counts.")):
        unit, size = text.byte_unit(row[column] for row in rows if row[column] is not None)
        return text.header(column, unit), lambda row: scaled(row[column], size)
    if column in rows[0]["case"] or column.startswith("case."):
        places = ranks(column, rows)
        return text.header(column), lambda row: param_cell(row.get(column), places)
    return text.header(column), lambda row: cell(row.get(column))


def _pivots(pivot: Pivot, index: Sequence[str], rows: Sequence[Row]) -> list[Table]:
    rows = [row for row in rows if all(row.get(k) == v for k, v in pivot.where.items())]
    if pivot.columns not in index or not rows:
        return []
    if pivot.value not in TIME_COLUMNS and all(row.get(pivot.value) is None for row in rows):
        return []
    down = [param for param in pivot.rows if param in index]
    per = [param for param in pivot.per if param in index]
    # Cases that the pivot's parameters do not tell apart must not collapse into one cell.
    down += further(index, (*down, *per, pivot.columns), rows)
    tables = []
    for values in combinations_of(per, rows):
        chosen = [row for row in rows if tuple(row.get(param) for param in per) == values]
        chosen_for = ", ".join(map(word, values))
        title = f"{pivot.title}: {chosen_for}" if per else pivot.title
        tables.append(_pivot(title, pivot, down, chosen))
    return tables


def _pivot(title: str, pivot: Pivot, down: Sequence[str], rows: Sequence[Row]) -> Table:
    across = values_of(pivot.columns, rows)
    found = {(*(row.get(param) for param in down), row.get(pivot.columns)): row for row in rows}
    places = [ranks(param, rows) for param in down]
    show, unit = _measure(pivot.value, rows)
    lines = []
    for values in combinations_of(down, rows):
        heads = [param_cell(value, place) for value, place in zip(values, places, strict=True)]
        lines.append([*heads, *(show(found.get((*values, column))) for column in across)])
    named = text.header(pivot.columns)
    numbers = all(isinstance(value, int | float) for value in across)
    return Table(
        title=f"{title} ({unit})" if unit else title,
        headers=[
            *(text.header(param) for param in down),
            *(f"{named}={value}" if numbers else word(value) for value in across),
        ],
        numeric=[*(_numeric(param, rows) for param in down), *(True for _ in across)],
        rows=lines,
    )


def _measure(column: str, rows: Sequence[Row]) -> tuple[Callable[[Row | None], Cell], str | None]:
    """Return what makes a pivot's cells of a measure, and the unit of those in bytes."""
    if not column.endswith("_bytes"):
        return lambda row: time_cell(row, column), None
    unit, size = text.byte_unit(row[column] for row in rows if row.get(column) is not None)

    def show(row: Row | None) -> Cell:
        if row is None or row["status"] != "ok":
            return time_cell(row, column)
        return scaled(row.get(column), size)

    return show, unit


def _measured_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for names, known in (("clock", text.CLOCKS), ("cache", text.CACHES)):
        values = sorted({row[names] for row in rows if row["median_ms"] is not None})
        if values:
            notes.append(f"{names.capitalize()}: {'; '.join(known[value] for value in values)}.")
    notes += [f"{said}." for said in dict.fromkeys(row[_SAID] for row in rows if row.get(_SAID))]
    calls = sorted({row["calls_per_round"] or 1 for row in rows if row["median_ms"] is not None})
    if calls and calls[-1] > 1:
        numbers = ", ".join(map(str, calls))
        notes.append(f"Calls made back to back in a round: {numbers}; times are of one call.")
    baselines = sorted({row["baseline"] for row in rows if row["baseline"]})
    if baselines and any(row["speedup"] is not None for row in rows):
        notes.append(f"Speed-up: median of the row with {'; or '.join(baselines)} over the median.")
    if any(row["share_of_peak"] is not None for row in rows):
        notes.append("Share of peak: model FLOP/s over the data sheet's dense rate for the dtype.")
    throttled = [row["throttle"] for row in rows if row["throttle"]]
    if throttled:
        reasons = ", ".join(sorted(set(throttled)))
        share = f"{len(throttled)} of {len(rows)} cases"
        notes.append(f"The device held its clocks down in {share}: {reasons}.")
    return notes


def _outcome_notes(rows: Sequence[Row]) -> list[str]:
    """Return one line per different reason for which cases have no time."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (text.STATUS[row["status"]], row["reason"] or "no reason given")
            groups.setdefault(key, []).append(row["id"].partition("[")[2][:-1])
    notes = []
    for (status, reason), cases in groups.items():
        more = f" and {len(cases) - _NAMED_CASES} more" if len(cases) > _NAMED_CASES else ""
        named = "; ".join(f"`{case}`" for case in cases[:_NAMED_CASES])
        notes.append(f"{status}: {reason} ({named}{more}).")
    return notes


def markdown(section: Section, pictures: Mapping[str, str] | None = None) -> str:
    """Return a section as a Markdown document, with pictures by address and title."""
    parts = [f"# {section.heading}", section.study.shows]
    parts += [f"![{title}]({address})" for address, title in (pictures or {}).items()]
    for table in section.tables:
        parts += [f"## {table.title}", markdown_table(table)]
    parts.append("\n".join(f"- {escape(note)}" for note in section.notes))
    parts.append("\n".join(f"Measured on: {escape(line)}" for line in section.stamp))
    return "\n\n".join(part for part in parts if part) + "\n"
