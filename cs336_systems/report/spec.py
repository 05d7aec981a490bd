"""The words in which a study says how it is shown: tables, pictures and whom it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bars", "lines", "rounds", "spread", "roofline", "stack", "timeline", "heatmap"]


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A small table of one measure: some parameters down, one across."""

    title: str
    rows: tuple[str, ...]
    columns: str
    per: tuple[str, ...] = ()
    """One table for each combination of these."""
    value: str = "median_ms"
    where: Mapping[str, Any] = field(default_factory=dict)
    """Values that the cases it shows have."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A table of chosen measures, a line for each case."""

    title: str
    values: tuple[str, ...]
    unsaid: str = ""
    """What their names begin with that the title says already."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture: what goes along each axis and what splits it into series and panels."""

    what: str
    """The second half of the file's name."""
    kind: Kind
    title: str
    y: str
    x: str = ""
    series: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    """One row of panels for each combination of these."""
    columns: tuple[str, ...] = ()
    """One column of panels for each combination of these."""
    per: tuple[str, ...] = ()
    """One picture for each combination of these, which end its name."""
    versus: bool = False
    """Draw, in place of the cases, how they compare with the study's own rows."""
    hide: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of parameters that only the table shows, so that lines can be told apart."""
    fullest: str | None = None
    """Keep one value of this parameter: that with the most values of `x`, of equals the largest."""
    ends: tuple[str, ...] = ()
    """Of these parameters' combinations keep the first and the last in order."""
    regardless: str | None = None
    """`y` does not depend on this parameter: of its rows keep the one that has it."""
    unsaid: tuple[str, ...] = ()
    """Parameters that need not be said where one value holds for the whole picture."""
    log_x: bool = False
    log_y: bool | None = None
    """None: where the largest value is many times the smallest."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """The measures that a `stack` is made of, lowest first, and what the legend calls them."""
    beside: str | None = None
    """A measure to draw beside `y`, as a dashed line: what a model says."""
    line_at: float | None = None
    """A level to compare bars with, which then carry their values."""
    guides: tuple[int, ...] = ()
    """Powers of `x` drawn behind lines, as slopes to compare theirs with."""
    most_panels: int = 12
    """Panels past these are left out, and the picture says so."""


@dataclass(frozen=True, kw_only=True)
class Versus:
    """Which of a study's rows are this project's own, and the time by which others are compared."""

    param: str
    """The parameter that names the implementation."""
    ours: str
    """What its values begin with where they are this project's own."""
    rows: tuple[str, ...]
    """Parameters that name a line of the table."""
    time: str = "median_ms"


@dataclass(frozen=True, kw_only=True)
class Study:
    """How one family of cases is shown."""

    name: str
    title: str
    shows: str
    index: tuple[str, ...] = ()
    listings: tuple[Listing, ...] = ()
    pivots: tuple[Pivot, ...] = ()
    versus: Versus | None = None
    plots: tuple[Plot, ...] | None = None
    """None: one line plot where a numeric parameter sweeps."""
