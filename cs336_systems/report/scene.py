"""What a picture will draw: its rows chosen, split into series and panels, and put in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cs336_systems.report import text
from cs336_systems.report.frame import Row
from cs336_systems.report.source import Roof
from cs336_systems.report.spec import Plot
from cs336_systems.report.studies import combinations_of, fullest, further, values_of, word

# A picture past these is neither readable nor quick; the tables have every row.
_MOST_SERIES = 12

Values = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture's data."""

    plot: Plot
    rows: Sequence[Row]
    series: Sequence[Values]
    down: Sequence[Values]
    """One row of panels for each."""
    across: Sequence[Values]
    """One column of panels for each."""
    said: Sequence[str]
    """What holds for the whole picture and so is in no label."""
    y_label: str
    y_size: float
    """How many of the column's units make one of the label's."""

    def panel(self, row: int, column: int) -> list[Row]:
        """Return the rows of one panel."""
        params = (*self.plot.rows, *self.plot.columns)
        wanted = (*self.down[row], *self.across[column])
        return [row for row in self.rows if values(params, row) == wanted]

    def of_series(self, wanted: Values, rows: Sequence[Row]) -> list[Row]:
        """Return those of some rows that belong to one series."""
        return [row for row in rows if values(self.plot.series, row) == wanted]

    def height(self, row: Row) -> float | None:
        """Return what the y axis shows of a row, None where it has no such measure."""
        value = row.get(self.plot.y)
        return None if value is None else value / self.y_size

    def beside(self, row: Row) -> float | None:
        """Return what is drawn beside that, None where there is nothing."""
        value = None if self.plot.beside is None else row.get(self.plot.beside)
        return None if value is None else value / self.y_size

    def heights(self, rows: Sequence[Row]) -> list[float]:
        """Return every value that the y axis must span for some rows."""
        if self.plot.kind == "timeline":
            return []
        if self.plot.kind == "rounds":
            return [value for row in rows for value in row["data_ms"] or ()]
        found = [height for height in map(self.height, rows) if height is not None]
        found += [value for row in rows if (value := self.beside(row)) is not None]
        if self.plot.kind == "roofline":
            found += [roof.at(row["intensity"]) for row in rows if (roof := row["roof"])]
        if self.plot.kind == "spread":
            found += [row["mean_ms"] + row["std_ms"] for row in rows if row["mean_ms"] is not None]
        return found

    def roofs(self, rows: Sequence[Row]) -> list[Roof]:
        """Return the different limits of the devices that some rows ran on, lowest first."""
        return sorted({row["roof"] for row in rows if row["roof"] is not None})

    @property
    def stopped(self) -> bool:
        """Whether some cases have an outcome in place of a time."""
        return any(row["status"] != "ok" for row in self.rows)


def values(params: Sequence[str], row: Row) -> Values:
    """Return a row's values of some parameters."""
    return tuple(row.get(param) for param in params)


def label(combination: Sequence[Any]) -> str:
    """Return a series' name."""
    return ", ".join(map(word, combination))


def heading(params: Sequence[str], combination: Values) -> str:
    """Return a panel's name, in which a bare number is preceded by what it is."""
    pairs = zip(params, combination, strict=True)
    return ", ".join(
        f"{text.header(param)} {value}" if numbers([value]) else word(value)
        for param, value in pairs
    )


def numbers(found: Sequence[Any]) -> bool:
    """Whether all values of a parameter are numbers, so that an axis can be drawn to scale."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)


def set_scene(plot: Plot, index: Sequence[str], rows: Sequence[Row]) -> Scene | None:
    """Return what a plot draws of some rows, None where it would be empty."""
    rows = [row for row in rows if not plot.x or row.get(plot.x) is not None]
    if plot.kind == "roofline":
        rows = [row for row in rows if row["roof"] is not None]
    known = (*index, "intensity", "")
    if not any(row.get(plot.y) is not None for row in rows) or plot.x not in known:
        return None
    swept = values_of(plot.x, rows)
    if plot.kind == "lines" and not (numbers(swept) and (len(swept) > 1 or plot.guides)):
        return None
    said: list[str] = []
    rows = _narrow(plot, index, rows, said)
    if not any(row.get(plot.y) is not None for row in rows):
        return None
    constant = [p for p in index if p != plot.x and len(values_of(p, rows)) == 1]
    shown = [p for p in constant if p != plot.regardless and p not in plot.unsaid]
    said += [f"{text.header(param)} {word(rows[0].get(param))}" for param in shown]
    return _split(_varying(plot, index, constant, rows), rows, said)


def generic_plots(index: Sequence[str], rows: Sequence[Row]) -> tuple[Plot, ...]:
    """Return a line plot over the numeric parameter with the most values, if any sweeps."""
    sweeps = {param: values_of(param, rows) for param in index}
    numeric = [param for param, found in sweeps.items() if len(found) > 1 and numbers(found)]
    if not numeric:
        return ()
    x = max(numeric, key=lambda param: len(sweeps[param]))
    low, high = sweeps[x][0], sweeps[x][-1]
    return (
        Plot(
            what="time",
            kind="lines",
            title=f"Median time by {text.header(x)}",
            x=x,
            y="median_ms",
            log_x=low > 0 and high / low > 4,
        ),
    )


def _narrow(plot: Plot, index: Sequence[str], rows: list[Row], said: list[str]) -> list[Row]:
    # A timed case without the measure, such as the share of peak of a pass that multiplies
    # nothing, has no place in the picture; one without a time is marked there.
    rows = [row for row in rows if row["status"] != "ok" or row.get(plot.y) is not None]
    for param, hidden in plot.hide.items():
        left_out = [word(value) for value in values_of(param, rows) if value in hidden]
        if left_out:
            said.append(f"{', '.join(left_out)} only in the table")
        rows = [row for row in rows if row.get(param) not in hidden]
    if plot.kind == "heatmap":
        rows = _compared(plot, rows, said)
    if plot.fullest is not None and plot.fullest in index:
        best = fullest(plot.fullest, plot.x, rows)
        rows = [row for row in rows if row.get(plot.fullest) == best]
    ends = [param for param in plot.ends if param in index]
    timed = [row for row in rows if row["status"] == "ok"]
    if ends and timed:
        found = combinations_of(ends, timed)
        # Of the later variants, the one that most cases were timed in; the last of equals.
        swept = [sum(values(ends, row) == variant for row in timed) for variant in found]
        other = max(range(len(found)), key=lambda index: (index > 0, swept[index], index))
        rows = [row for row in rows if values(ends, row) in (found[0], found[other])]
        if len(found) > 2:
            said.append(f"two of {len(found)} variants, all are in the table")
    if plot.regardless is not None and plot.regardless in index:
        rest = [param for param in index if param != plot.regardless]
        # Rows that hold the measure come last and so replace those that do not.
        ordered = sorted(rows, key=lambda row: row.get(plot.y) is not None)
        rows = list({values(rest, row): row for row in ordered}.values())
        rows = [{**row, plot.regardless: None} for row in rows]
    return rows


def _compared(plot: Plot, rows: list[Row], said: list[str]) -> list[Row]:
    """Return the cases that are held against a baseline, without the baseline's own."""
    bases = sorted({row["baseline"] for row in rows if row["baseline"]})
    said.append(f"over {', '.join(bases)}; above 1 (blue) is faster")
    others = [
        row
        for row in rows
        if not any(f"{param}={row.get(param)}" in bases for param in plot.columns)
    ]
    timed = {values(plot.columns, row) for row in others if row["status"] == "ok"}
    untimed = [found for found in combinations_of(plot.columns, others) if found not in timed]
    if untimed:
        said.append(f"no time at all: {'; '.join(map(label, untimed))}")
    kept = [row for row in others if values(plot.columns, row) in timed]
    # A baseline alone is compared with itself rather than with nothing.
    return kept or rows


def _varying(
    plot: Plot, index: Sequence[str], constant: Sequence[str], rows: Sequence[Row]
) -> Plot:
    """Return the plot without constant parameters, and with those that only the data has."""

    def kept(params: Sequence[str]) -> tuple[str, ...]:
        return tuple(param for param in params if param in index and param not in constant)

    # A parameter the specification does not know must not fold several rows into one point.
    named = (*plot.series, *plot.rows, *plot.columns, plot.x)
    extra = tuple(further(kept(index), named, rows))
    if plot.kind == "roofline":
        extra = ()  # Its points are cases by themselves, and no line through them folds any.
    in_panels = plot.kind in ("rounds", "spread", "stack", "heatmap")
    return replace(
        plot,
        series=kept(plot.series) + (() if in_panels else extra),
        rows=kept(plot.rows) + (extra if in_panels else ()),
        columns=kept(plot.columns),
    )


def _with_times(plot: Plot, rows: list[Row], said: list[str]) -> list[Row]:
    """Return the rows of the series that were timed at all, and say which were not."""
    timed = {values(plot.series, row) for row in rows if row.get(plot.y) is not None}
    untimed = [found for found in combinations_of(plot.series, rows) if found not in timed]
    if untimed:
        said.append(f"no time at all: {'; '.join(map(label, untimed))}")
    return [row for row in rows if values(plot.series, row) in timed]


def _split(plot: Plot, rows: list[Row], said: list[str]) -> Scene:
    rows = _with_times(plot, rows, said)
    series = combinations_of(plot.series, rows)
    if len(series) > _MOST_SERIES:
        said.append(f"first {_MOST_SERIES} of {len(series)} series, all are in the table")
        series = series[:_MOST_SERIES]
        rows = [row for row in rows if values(plot.series, row) in series]
    across = combinations_of(plot.columns, rows)
    if len(across) > plot.most_panels:
        said.append(f"first {plot.most_panels} of {len(across)} panels, all are in the table")
        across = across[: plot.most_panels]
    down = combinations_of(plot.rows, rows)
    most = max(plot.most_panels // len(across), 1)
    if len(down) > most:
        said.append(f"first {most} of {len(down)} rows of panels, all are in the table")
    unit, size = None, 1.0
    if plot.y.endswith("_bytes"):
        unit, size = text.byte_unit(row[plot.y] for row in rows if row[plot.y] is not None)
    return Scene(
        plot=plot,
        rows=rows,
        series=series,
        down=down[:most],
        across=across,
        said=said,
        y_label=text.header(plot.y, unit, axis=True),
        y_size=size,
    )
