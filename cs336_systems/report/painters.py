"""What goes into one panel: bars, lines, rounds in order, or a mean with its spread."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cs336_systems.report import text
from cs336_systems.report.canvas import log_ticks_at
from cs336_systems.report.frame import Row
from cs336_systems.report.guides import paint_guides
from cs336_systems.report.palette import Look, Palette
from cs336_systems.report.scene import Scene, Values, values
from cs336_systems.report.source import Roof
from cs336_systems.report.studies import values_of, word
from cs336_systems.report.text import plain

_GROUP = 0.84
"""The part of a group's room that its bars fill."""
_WIDEST = 0.3
"""The most of it that a single bar takes."""
_LABEL_COLUMNS = 13
"""Letters in a line of a group's label."""
_MOST_LEVEL_NUMBERS = 12
"""Bars in a panel that leave room for level numbers above them."""
_STUB = 0.045
"""The height of the hatched stub of a case without a time, as a part of the axis."""
_ROOF = "#555555"
BAND = 0.13
"""The height of the band above the lines that marks cases without a time."""


def look(scene: Scene, palette: Palette, wanted: Values) -> Look:
    """Return how a series is drawn in this kind of picture."""
    pick = palette.filled if scene.plot.kind in ("bars", "spread") else palette.line
    return pick(scene.plot.series, wanted)


def handle(scene: Scene, palette: Palette, wanted: Values) -> Artist:
    """Return a series' entry in the legend."""
    style = look(scene, palette, wanted)
    if scene.plot.kind in ("bars", "spread"):
        return Patch(facecolor=style.colour)
    return Line2D(
        [], [], color=style.colour, marker=style.marker, linestyle=style.dash, ms=4.5, mfc="none"
    )


def stopped_handle(scene: Scene) -> Artist:
    """Return the legend's entry for cases without a time."""
    if scene.plot.kind == "bars":
        return Patch(facecolor="none", edgecolor="#555555", hatch="//////")
    return Line2D([], [], color="#555555", marker="x", linestyle="none", ms=5)


def _paint_bars(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    groups = values_of(scene.plot.x, scene.rows)
    width = min(_GROUP / len(scene.series), _WIDEST)
    for position, wanted in enumerate(scene.series):
        style = look(scene, palette, wanted)
        for row in scene.of_series(wanted, rows):
            beside = width * (position - (len(scene.series) - 1) / 2)
            at = groups.index(row[scene.plot.x]) + beside
            height = scene.height(row)
            if height is not None:
                axes.bar(at, height, width * 0.92, color=style.colour)
            elif row["status"] != "ok":
                mark_bar(axes, at, width * 0.92, style.colour, text.STATUS[row["status"]])
            if height is not None and scene.plot.line_at is not None:
                upright = len(groups) * len(scene.series) > _MOST_LEVEL_NUMBERS
                _number_bar(axes, at, height, 90 if upright else 0)
    if scene.plot.line_at is not None:
        axes.axhline(scene.plot.line_at, color="#333333", linewidth=0.9, linestyle="--")
    axes.set_xticks(range(len(groups)), [group_label(group) for group in groups])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.tick_params(axis="x", length=0, labelsize=8.5 if len(groups) < 7 else 7.5)


def _number_bar(axes: Axes, at: float, height: float, rotation: float) -> None:
    # On white, because a line that the bars are compared with may run behind it.
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style = {"fontsize": 6.5, "rotation": rotation, "ha": "center", "va": "bottom", "bbox": white}
    place = {"xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate(f"{height:.2f}", (at, height), **place, **style)  # type: ignore[arg-type]


def group_label(group: Any) -> str:
    """Return the label of a group of bars, long ones in lines of a few words."""
    # Names in code are broken behind an underscore, as if a space were there.
    lines = textwrap.wrap(word(group).replace("_", "_ "), _LABEL_COLUMNS + 1)
    return "\n".join(lines).replace("_ ", "_") or word(group)


def mark_bar(axes: Axes, at: float, width: float, colour: str, outcome: str) -> None:
    # Data along x, axis fractions along y: the mark stands on the axis whatever its scale.
    across = axes.get_xaxis_transform()
    axes.add_patch(
        Rectangle(
            (at - width / 2, 0),
            width,
            _STUB,
            transform=across,
            facecolor="none",
            edgecolor=colour,
            hatch="//////",
            linewidth=0.6,
        )
    )
    style = {"fontsize": 6.5, "rotation": 90, "ha": "center", "va": "bottom", "color": colour}
    axes.text(at, _STUB + 0.015, outcome, transform=across, **style)  # type: ignore[arg-type]


def _paint_lines(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    x = scene.plot.x
    for position, wanted in enumerate(scene.series):
        style = look(scene, palette, wanted)
        own = sorted(scene.of_series(wanted, rows), key=lambda row: float(row[x]))
        heights = [(row[x], scene.height(row)) for row in own]
        points = [(at, height) for at, height in heights if height is not None]
        axes.plot(
            [at for at, _ in points],
            [height for _, height in points],
            color=style.colour,
            marker=style.marker,
            linestyle=style.dash,
            **_stroke(position, len(scene.series)),
        )
        _paint_beside(scene, axes, own, style.colour)
    paint_guides(scene, axes, rows)
    if scene.stopped:
        _mark_stops(scene, palette, axes, rows)
    swept = values_of(x, scene.rows)
    if scene.plot.log_x and swept[0] > 0:
        log_ticks_at(axes, swept)
        axes.set_xlim(swept[0] / 1.25, swept[-1] * 1.25)


def _paint_beside(scene: Scene, axes: Axes, rows: Sequence[Row], colour: str) -> None:
    found = [(row[scene.plot.x], scene.beside(row)) for row in rows]
    points = [(at, height) for at, height in found if height is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=(0, (4, 2)), linewidth=0.9)


def _mark_stops(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    # A band of its own, because a mark among the lines would read as a time.
    band = Rectangle((0, 1 - BAND), 1, BAND, transform=axes.transAxes, color="#f0f0f0", lw=0)
    axes.add_patch(band).set_zorder(0)
    stopped = [row for row in rows if row["status"] != "ok"]
    series = [wanted for wanted in scene.series if scene.of_series(wanted, stopped)]
    for position, wanted in enumerate(series):
        stops = [row[scene.plot.x] for row in scene.of_series(wanted, stopped)]
        axes.plot(
            stops,
            [1 - BAND * (position + 0.5) / len(series)] * len(stops),
            color=look(scene, palette, wanted).colour,
            marker="x",
            markersize=4.5,
            linestyle="none",
            transform=axes.get_xaxis_transform(),
        )


def _stroke(position: int, count: int) -> dict[str, Any]:
    """Return widths that thin from series to series, so that equal lines show one another."""
    return {"linewidth": 2.1 - 0.9 * position / max(count - 1, 1), "ms": 4.5, "mfc": "none"}


def _paint_rounds(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    for position, wanted in enumerate(scene.series):
        style = look(scene, palette, wanted)
        for row in scene.of_series(wanted, rows):
            data = row["data_ms"] or []
            axes.plot(
                range(1, len(data) + 1),
                data,
                color=style.colour,
                marker=style.marker,
                linestyle=style.dash,
                **_stroke(position, len(scene.series)),
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _paint_spread(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    groups = values_of(scene.plot.x, scene.rows)
    for row in rows:
        height = scene.height(row)
        if height is not None:
            wanted = tuple(row.get(param) for param in scene.plot.series)
            axes.bar(
                groups.index(row[scene.plot.x]),
                height,
                0.6,
                yerr=row["std_ms"],
                color=look(scene, palette, wanted).colour,
                error_kw={"elinewidth": 1.0, "capsize": 3, "ecolor": "#333333"},
            )
    axes.set_xticks(range(len(groups)), [word(group) for group in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)


def _paint_roofline(scene: Scene, palette: Palette, axes: Axes, rows: Sequence[Row]) -> None:
    every = [row["intensity"] for row in scene.rows]
    roofs = scene.roofs(rows)
    # The bend of the roof is in the picture, also when every case lies far beyond it.
    left = min([min(every) / 1.5, *(roof.ridge / 3 for roof in roofs)])
    right = max(every) * 1.5
    for roof in roofs:
        _paint_roof(axes, roof, left, right)
    joined = _one_case_per_point(scene)
    for position, wanted in enumerate(scene.series):
        style = look(scene, palette, wanted)
        heights = [(row["intensity"], scene.height(row)) for row in scene.of_series(wanted, rows)]
        points = sorted((at, height) for at, height in heights if height is not None)
        axes.plot(
            [at for at, _ in points],
            [height for _, height in points],
            color=style.colour,
            marker=style.marker,
            linestyle=style.dash if joined else "none",
            **_stroke(position, len(scene.series)),
        )
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _one_case_per_point(scene: Scene) -> bool:
    """Whether a line can follow each series: several shapes of one intensity are no sequence."""
    params = (*scene.plot.series, *scene.plot.rows, *scene.plot.columns, "intensity")
    places = [values(params, row) for row in scene.rows]
    return len(set(places)) == len(places)


def _paint_roof(axes: Axes, roof: Roof, left: float, right: float) -> None:
    bends = [left, *((roof.ridge,) if left < roof.ridge < right else ()), right]
    axes.plot(bends, [roof.at(at) for at in bends], color=_ROOF, linewidth=1.0)
    limits = f"{roof.tflops:g} TFLOP/s, {roof.terabytes_per_s:g} TB/s"
    axes.annotate(
        limits,
        (right, roof.at(right)),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=6.5,
        color=_ROOF,
    )


Painter = Callable[[Scene, Palette, Axes, Sequence[Row]], None]

PAINTERS: dict[str, Painter] = {
    "bars": _paint_bars,
    "lines": _paint_lines,
    "rounds": _paint_rounds,
    "spread": _paint_spread,
    "roofline": _paint_roofline,
}
