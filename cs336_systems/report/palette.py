"""Colours, hatches and line styles: the same series looks the same in every picture of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cs336_systems.report.frame import Row
from cs336_systems.report.studies import combinations_of

# Source: Okabe and Ito, "Color Universal Design"; its yellow, too pale on white, is a grey here.
# The last four: Tol, "Colour schemes", muted.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    marker: str
    dash: Literal["-", "--", ":", "-."]


class Palette:
    """Gives every combination of a report's series parameters its look."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._ranks: dict[tuple[str, ...], dict[tuple[Any, ...], int]] = {}

    def filled(self, params: Sequence[str], values: Sequence[Any]) -> Look:
        """Return the look of a bar: a colour of its own for every combination."""
        return _look(self._rank(params, values), 0)

    def line(self, params: Sequence[str], values: Sequence[Any]) -> Look:
        """Return the look of a line: the first parameter sets its colour, the others its dashes."""
        return _look(self._rank(params[:1], values[:1]), self._rank(params[1:], values[1:]))

    def _rank(self, params: Sequence[str], values: Sequence[Any]) -> int:
        key = tuple(params)
        if key not in self._ranks:
            having = [row for row in self._rows if all(param in row["case"] for param in key)]
            self._ranks[key] = {v: rank for rank, v in enumerate(combinations_of(key, having))}
        return self._ranks[key].get(tuple(values), 0)


def part_colour(number: int) -> str:
    """Return the colour of one of several parts that a picture names itself."""
    return _COLOURS[number % len(_COLOURS)]


def _look(first: int, second: int) -> Look:
    # Past the last colour the dashes change, so that two series never look alike.
    dash = second + first // len(_COLOURS)
    return Look(
        colour=_COLOURS[first % len(_COLOURS)],
        marker=_MARKERS[first % len(_MARKERS)],
        dash=_DASHES[dash % len(_DASHES)],
    )
