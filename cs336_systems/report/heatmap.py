"""A panel of numbered squares: a ratio by queries and keys, blue above 1 and orange below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from cs336_systems.report import text
from cs336_systems.report.frame import Row
from cs336_systems.report.palette import Palette
from cs336_systems.report.scene import Scene
from cs336_systems.report.studies import values_of

DOWN = "queries"
"""The parameter along the y axis."""
_COLOURS = LinearSegmentedColormap.from_list("ratio", ["#D55E00", "#FFFFFF", "#0072B2"])
_LEAST_DOUBLINGS = 1.0
"""Ratios near 1 stay pale also where nothing is far from 1."""
_DARK = 0.8
"""The part of the strongest colour from which on letters on it are white."""


def paint_heatmap(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a square for each case, coloured by how often its ratio doubles or halves."""
    across, down = values_of(scene.plot.x, scene.rows), values_of(DOWN, scene.rows)
    found = [height for row in scene.rows if (height := scene.height(row))]
    most = max([_LEAST_DOUBLINGS, *(abs(math.log2(height)) for height in found)])
    for row in rows:
        place = across.index(row[scene.plot.x]), down.index(row[DOWN])
        _paint_square(axes, place, row, scene.height(row), most)
    axes.set_xlim(-0.5, len(across) - 0.5)
    axes.set_ylim(-0.5, len(down) - 0.5)
    axes.set_xticks(range(len(across)), [text.plain(value) for value in across])
    axes.set_yticks(range(len(down)), [text.plain(value) for value in down])
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _paint_square(
    axes: Axes, place: tuple[int, int], row: Row, ratio: float | None, most: float
) -> None:
    strength = 0.0 if not ratio else math.log2(ratio) / most
    corner = place[0] - 0.5, place[1] - 0.5
    colour = _COLOURS(0.5 + strength / 2) if ratio else "#f0f0f0"
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.0))
    words = text.significant(ratio, 3) if ratio else text.STATUS.get(row["status"], text.NOTHING)
    ink = "white" if abs(strength) > _DARK else "black"
    axes.text(*place, words, fontsize=7, ha="center", va="center", color=ink)
