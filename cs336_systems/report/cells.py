"""Tables as cells: what each shows, what it sorts by, and how a table is written in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from cs336_systems.report import text
from cs336_systems.report.frame import Row
from cs336_systems.report.studies import values_of, word


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what a click on its heading sorts by."""

    text: str
    sort: float | str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings and cells; `numeric` columns are right-aligned."""

    title: str
    headers: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]]


def cell(value: Any) -> Cell:
    """Return the cell of a number or a word."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(text.any_text(value), float(value))
    return Cell(text.any_text(value), "" if value is None else str(value))


def time_cell(row: Row | None, column: str = "median_ms") -> Cell:
    """Return a time, or the outcome that took its place."""
    if row is None:
        return Cell(text.NOTHING, "")
    if row["status"] != "ok":
        return Cell(text.STATUS[row["status"]], text.STATUS[row["status"]])
    return cell(row.get(column))


def ranks(param: str, rows: Sequence[Row]) -> dict[Any, int]:
    """Return the place of each of a parameter's values in its order."""
    return {value: rank for rank, value in enumerate(values_of(param, rows))}


def param_cell(value: Any, ranks: Mapping[Any, int]) -> Cell:
    """Return a parameter's cell, which sorts in the parameter's own order."""
    return Cell(word(value), "" if value is None else float(ranks[value]))


def scaled(num_bytes: float | None, size: float) -> Cell:
    """Return the cell of a number of bytes in units of `size`."""
    return cell(None) if num_bytes is None else cell(num_bytes / size)


def markdown_table(table: Table) -> str:
    """Return a table in Markdown, numbers to the right."""
    return tabulate(
        [[_escape_cell(cell.text) for cell in row] for row in table.rows],
        headers=[_escape_cell(header) for header in table.headers],
        tablefmt="pipe",
        colalign=["right" if numeric else "left" for numeric in table.numeric],
        disable_numparse=True,
    )


def escape(line: str) -> str:
    """Return one line in which nothing opens a tag or emphasis outside its code spans."""
    spans = " ".join(line.split()).split("`")
    spans[::2] = [span.replace("<", "&lt;").replace("*", r"\*") for span in spans[::2]]
    return "`".join(spans)


def _escape_cell(line: str) -> str:
    return escape(line).replace("|", r"\|")
