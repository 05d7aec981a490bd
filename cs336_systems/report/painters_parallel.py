"""Panels of what ranks do: memory stacked by kind, and the lanes of a step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cs336_systems.measure.intervals import unpack
from cs336_systems.report import text
from cs336_systems.report.frame import Row
from cs336_systems.report.heatmap import paint_heatmap
from cs336_systems.report.painters import PAINTERS, Painter, group_label, mark_bar
from cs336_systems.report.palette import Palette, part_colour
from cs336_systems.report.scene import Scene, label
from cs336_systems.report.studies import values_of

_WIDTH = 0.62
_LANE_HEIGHT = 0.36
_LANES = ("compute", "communication")
"""Of rank 0, in the order of their rows."""


def _paint_stack(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    groups = values_of(scene.plot.x, scene.rows)
    for row in rows:
        at = groups.index(row[scene.plot.x])
        if row["status"] != "ok":
            mark_bar(axes, at, _WIDTH, "#555555", text.STATUS[row["status"]])
            continue
        bottom = 0.0
        for number, column in enumerate(scene.plot.parts):
            height = (row.get(column) or 0.0) / scene.y_size
            axes.bar(at, height, _WIDTH, bottom=bottom, color=part_colour(number))
            bottom += height
        if (expected := scene.beside(row)) is not None:
            axes.plot([at - 0.44, at + 0.44], [expected] * 2, color="black", linestyle="--", lw=1.1)
    axes.set_xticks(range(len(groups)), [group_label(group) for group in groups])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.tick_params(axis="x", length=0, labelsize=8.5 if len(groups) < 7 else 7.5)


def _paint_timeline(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    latest = 0.0
    for position, wanted in enumerate(scene.series):
        for row in scene.of_series(wanted, rows):
            for number, lane in enumerate(_LANES):
                intervals = unpack((row["timeline"] or {}).get(f"0 {lane}", ""))
                top = position + (number - 1) * (_LANE_HEIGHT + 0.04)
                bars = [(begin, end - begin) for begin, end in intervals]
                axes.broken_barh(bars, (top, _LANE_HEIGHT), color=part_colour(number), linewidth=0)
                latest = max([latest, *(end for _, end in intervals)])
    names = [label(wanted) or "step" for wanted in scene.series]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, latest * 1.01 or 1.0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)


def part_entries(scene: Scene) -> list[tuple[str, Artist]]:
    """Return the legend's entries of a picture whose colours are not its series."""
    names = list(scene.plot.parts.values()) if scene.plot.kind == "stack" else list(_LANES)
    entries: list[tuple[str, Artist]] = [
        (name, Patch(facecolor=part_colour(number))) for number, name in enumerate(names)
    ]
    return entries[::-1] if scene.plot.kind == "stack" else entries


def beside_entry(scene: Scene) -> list[tuple[str, Artist]]:
    """Return the legend's entry of what is drawn beside the measure, if anything is."""
    if all(scene.beside(row) is None for row in scene.rows):
        return []
    line = Line2D([], [], color="black", linestyle="--", linewidth=1.1)
    return [("predicted", line)]


ALL_PAINTERS: dict[str, Painter] = {
    **PAINTERS,
    "stack": _paint_stack,
    "timeline": _paint_timeline,
    "heatmap": paint_heatmap,
}
