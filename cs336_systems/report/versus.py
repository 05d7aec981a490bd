"""The project's own rows against everybody else's: one ratio for each case both were timed in."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_systems.report import text
from cs336_systems.report.cells import Cell, Table, cell, param_cell, ranks, time_cell
from cs336_systems.report.frame import Row
from cs336_systems.report.spec import Versus
from cs336_systems.report.studies import combinations_of, further, values_of, word


def advantages(versus: Versus, index: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Return the other implementations' cases, once for each of ours, with the ratio of times.

    `advantage` is the other's time over ours, so above 1 ours is faster; `ours` names ours.
    """
    mine, others = _split(versus, rows)
    rest = [param for param in index if param != versus.param]
    by_case: dict[tuple[object, ...], list[Row]] = {}
    for row in mine:
        by_case.setdefault(tuple(row.get(param) for param in rest), []).append(row)
    return [
        {**other, "ours": own[versus.param], "advantage": _ratio(versus, other, own)}
        for other in others
        for own in by_case.get(tuple(other.get(param) for param in rest), ())
        if _time(versus, own) is not None
    ]


def versus_tables(versus: Versus, index: Sequence[str], rows: Sequence[Row]) -> list[Table]:
    """Return a table for each of our rows that was timed: its times, the others' and the ratios."""
    mine, others = _split(versus, rows)
    timed = [row for row in mine if _time(versus, row) is not None]
    names = values_of(versus.param, others)
    if not names:
        return []
    return [
        _table(versus, index, [row for row in timed if row[versus.param] == ours], others, names)
        for ours in values_of(versus.param, timed)
    ]


def _table(
    versus: Versus, index: Sequence[str], own: list[Row], others: list[Row], names: Sequence[str]
) -> Table:
    rest = [param for param in index if param != versus.param]
    down = [param for param in versus.rows if param in rest]
    down += further(rest, down, [*own, *others])
    found = {tuple(row.get(param) for param in (*down, versus.param)): row for row in others}
    mine = {tuple(row.get(param) for param in down): row for row in own}
    places = [ranks(param, own) for param in down]
    lines = []
    for values in combinations_of(down, own):
        heads = [param_cell(value, place) for value, place in zip(values, places, strict=True)]
        cells = [_pair(versus, found.get((*values, name)), mine[values]) for name in names]
        lines.append(
            [*heads, *_ours(versus, mine[values]), *(part for pair in cells for part in pair)]
        )
    name = own[0][versus.param]
    measure = text.header(versus.time).replace("median (ms)", "ms")
    headers = [*(text.header(param) for param in down), f"ours, {measure}", "ours, model TFLOP/s"]
    headers += [head for other in names for head in (f"{other}, {measure}", f"{other} / ours (x)")]
    return Table(
        title=f"{word(name)} beside the others",
        headers=headers,
        numeric=[*(False for _ in down), *(True for _ in headers[len(down) :])],
        rows=lines,
    )


def _ours(versus: Versus, row: Row) -> list[Cell]:
    time, rate = _time(versus, row), row["tflops"]
    assert time is not None
    # The rate is by the median; where the times are another clock's, so is the rate.
    return [cell(time), cell(None if rate is None else rate * row["median_ms"] / time)]


def _pair(versus: Versus, other: Row | None, own: Row) -> tuple[Cell, Cell]:
    ratio = None if other is None else _ratio(versus, other, own)
    return time_cell(other, versus.time), cell(ratio)


def _split(versus: Versus, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    mine: list[Row] = []
    others: list[Row] = []
    for row in rows:
        name = row.get(versus.param)
        if name is not None:
            (mine if str(name).startswith(versus.ours) else others).append(row)
    return mine, others


def _ratio(versus: Versus, other: Row, own: Row) -> float | None:
    theirs, ours = _time(versus, other), _time(versus, own)
    return None if theirs is None or not ours else theirs / ours


def _time(versus: Versus, row: Row) -> float | None:
    time: float | None = row.get(versus.time)
    return time if time and time > 0 else None
