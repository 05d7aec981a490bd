"""The same cases in several runs: others' times over ours in each, as a median and a spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from cs336_systems.errors import UsageError, bad
from cs336_systems.report.cells import Cell, Table, cell, param_cell, ranks
from cs336_systems.report.frame import Frame, Row
from cs336_systems.report.side import unlike
from cs336_systems.report.spec import Versus
from cs336_systems.report.studies import (
    STUDIES,
    combinations_of,
    further,
    index_of,
    study_of,
    values_of,
    word,
)
from cs336_systems.report.text import any_text
from cs336_systems.report.versus import advantages

COMPARED = tuple(name for name, study in STUDIES.items() if study.versus is not None)
"""The studies that hold the project's own rows against others."""


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """One of ours and one other on one case: the other's time over ours, of every run."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median over the runs."""
        return median(self.values)

    def words(self) -> str:
        """Return median, least and most."""
        least, most = min(self.values), max(self.values)
        return f"{any_text(self.middle)} [{any_text(least)}, {any_text(most)}]"


def repeat_tables(frames: Sequence[Frame], study: str) -> list[Table]:
    """Return, for each of the project's own rows, its ratios to every other over all runs.

    Only cases that every run timed are shown; the last line is the geometric mean of the medians.
    Raises: UsageError for runs on unlike machines, and for a study without others or without cases.
    """
    if study not in COMPARED:
        raise bad("report", "--study", f"be one of {', '.join(COMPARED)}", study)
    if differences := unlike(frames[:1], frames[1:]):
        raise UsageError(f"report: repeats refused: {'; '.join(differences)}")
    versus = study_of(study).versus
    assert versus is not None
    runs = [_advantages(frame, study, versus) for frame in frames]
    rows = [row for run in runs for row in run]
    index = [param for param in index_of(study_of(study), rows) if param != versus.param]
    down = [*versus.rows, *further(index, versus.rows, rows)]
    tables = []
    for ours in values_of("ours", rows):
        own = [[row for row in run if row["ours"] == ours] for run in runs]
        found = _ratios(own, (*down, versus.param))
        if found:
            tables.append(_table(word(ours), (*down, versus.param), found, rows))
    if not tables:
        raise UsageError(f"report: {study}: no case was timed beside another in every run")
    return tables


def _advantages(frame: Frame, study: str, versus: Versus) -> list[Row]:
    rows = [row for row in frame.rows() if row["study"] == study]
    found = advantages(versus, index_of(study_of(study), rows), rows)
    return [row for row in found if row["advantage"] is not None]


_Case = tuple[Any, ...]


def _ratios(runs: Sequence[Sequence[Row]], params: Sequence[str]) -> dict[_Case, Ratios]:
    """Return the ratios of the cases that every run has, by the values of some parameters."""
    by_run = [
        {tuple(row.get(name) for name in params): row["advantage"] for row in run} for run in runs
    ]
    everywhere = [case for case in by_run[0] if all(case in run for run in by_run)]
    return {case: Ratios(values=tuple(run[case] for run in by_run)) for case in everywhere}


def _table(
    ours: str, params: Sequence[str], found: dict[_Case, Ratios], rows: Sequence[Row]
) -> Table:
    """Return a line for each case and a column for each other, the last of the parameters."""
    *down, other_param = params
    others = [name for name in values_of(other_param, rows) if any(c[-1] == name for c in found)]
    places = [ranks(param, rows) for param in down]
    lines: list[list[Cell]] = []
    for values in combinations_of(down, rows):
        ratios = [found.get((*values, other)) for other in others]
        if any(ratios):
            heads = [param_cell(value, place) for value, place in zip(values, places, strict=True)]
            lines.append([*heads, *map(_cell, ratios)])
    blanks = [cell("geometric mean"), *(cell("") for _ in down[1:])]
    lines.append([*blanks, *(cell(_mean(found, other)) for other in others)])
    num_runs = len(next(iter(found.values())).values)
    return Table(
        title=f"Others' time over that of {ours}, {num_runs} runs: median [least, most]",
        headers=[*map(word, down), *map(word, others)],
        numeric=[*(False for _ in down), *(True for _ in others)],
        rows=lines,
    )


def _cell(ratios: Ratios | None) -> Cell:
    return cell(None) if ratios is None else Cell(ratios.words(), ratios.middle)


def _mean(found: dict[_Case, Ratios], other: str) -> float:
    return geometric_mean(r.middle for case, r in found.items() if case[-1] == other)
