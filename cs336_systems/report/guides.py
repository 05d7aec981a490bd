"""Slopes behind lines: how a time would grow that goes with a power of what is swept."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cs336_systems.report.frame import Row
from cs336_systems.report.scene import Scene
from cs336_systems.report.studies import values_of

_GREY = "#777777"
_DASHES = ((0, (1, 2)), (0, (5, 3)), (0, (5, 2, 1, 2)))
_RAISED = {1: "", 2: "²", 3: "³"}


def paint_guides(scene: Scene, axes: Axes, rows: Sequence[Row]) -> None:
    """Draw each power down from the panel's highest point at its last value."""
    heights = [(row[scene.plot.x], height) for row in rows if (height := scene.height(row))]
    if not heights or not scene.plot.guides:
        return
    swept = values_of(scene.plot.x, rows)
    last = max(at for at, _ in heights)
    highest = max(height for at, height in heights if at == last)
    # The axis is to fit the cases; a steep slope leaves it at the bottom.
    for power, dashes in zip(scene.plot.guides, _DASHES, strict=False):
        drawn = [highest * (at / last) ** power for at in swept]
        axes.plot(swept, drawn, color=_GREY, linestyle=dashes, linewidth=0.9, zorder=1.5)


def guide_entries(scene: Scene) -> list[tuple[str, Artist]]:
    """Return the legend's entries of the slopes."""
    return [
        (
            f"slope of N{_RAISED.get(power, f'^{power}')}",
            Line2D([], [], color=_GREY, linestyle=dashes, linewidth=0.9),
        )
        for power, dashes in zip(scene.plot.guides, _DASHES, strict=False)
    ]
