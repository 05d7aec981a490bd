"""The pictures of one study on one hardware, drawn as its specification says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from cs336_systems.report import text
from cs336_systems.report.canvas import Canvas, drawing, scale_y
from cs336_systems.report.frame import Row
from cs336_systems.report.painters import BAND, PAINTERS, group_label, handle, stopped_handle
from cs336_systems.report.palette import Palette
from cs336_systems.report.scene import Scene, generic_plots, heading, label, set_scene
from cs336_systems.report.spec import Plot
from cs336_systems.report.studies import combinations_of, index_of, values_of, word
from cs336_systems.report.tables import Section
from cs336_systems.report.versus import advantages

# From this ratio of largest to smallest on, a linear axis hides the smallest.
_WIDE = 10.0
_STOPPED = "no time: see the table"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG and the words for it."""

    name: str
    title: str
    png: bytes


def pictures(section: Section, palette: Palette) -> list[Picture]:
    """Return the pictures of one section; those without anything to draw are left out."""
    index = index_of(section.study, section.rows)
    plots = section.study.plots
    if plots is None:
        plots = generic_plots(index, section.rows)
    scenes = [
        set_scene(each, index_of_each, rows)
        for plot in plots
        for each, index_of_each, rows in _each(plot, index, section)
    ]
    return [_picture(scene, section, palette) for scene in scenes if scene is not None]


def _each(
    plot: Plot, index: Sequence[str], section: Section
) -> Iterator[tuple[Plot, Sequence[str], Sequence[Row]]]:
    """Yield the pictures that a plot asks for, with the parameters and the rows of each."""
    rows: Sequence[Row] = section.rows
    if plot.versus:
        assert section.study.versus is not None
        rows, index = advantages(section.study.versus, index, rows), [*index, "ours"]
    per = [param for param in plot.per if param in index]
    for values in combinations_of(per, rows):
        name = "_".join((plot.what, *(re.sub(r"[^A-Za-z0-9.-]+", "-", word(v)) for v in values)))
        title = ", ".join((plot.title, *map(word, values)))
        own = [row for row in rows if tuple(row.get(param) for param in per) == values]
        yield replace(plot, what=name, title=title), index, own


def _picture(scene: Scene, section: Section, palette: Palette) -> Picture:
    with drawing():
        png = _paint(scene, section, palette)
    return Picture(
        name=f"{section.name}_{scene.plot.what}",
        title=f"{scene.plot.title} on {section.hardware.label}",
        png=png,
    )


def _paint(scene: Scene, section: Section, palette: Palette) -> bytes:
    canvas = _canvas(scene, section)
    for row, line in enumerate(canvas.axes):
        for column, axes in enumerate(line):
            _panel(scene, palette, axes, row, column)
    if canvas.legend_labels:
        handles = [handle(scene, palette, wanted) for wanted in scene.series if wanted]
        if canvas.legend_labels[-1] == _STOPPED:
            handles.append(stopped_handle(scene))
        canvas.legend(handles)
    return canvas.png()


def _canvas(scene: Scene, section: Section) -> Canvas:
    num_rows, num_columns = len(scene.down), len(scene.across)
    wide = scene.plot.kind == "bars" and num_columns == 1
    labels = [label(wanted) for wanted in scene.series if wanted]
    if scene.stopped and scene.plot.kind in ("bars", "lines"):
        labels.append(_STOPPED)
    groups = values_of(scene.plot.x, scene.rows) if scene.plot.kind == "bars" else []
    if scene.plot.kind == "spread":
        # Its x axis already names the series.
        labels = []
    return Canvas(
        title=f"{scene.plot.title} on {section.hardware.label}",
        subtitle=", ".join(scene.said),
        stamp=section.brief_stamp,
        num_rows=num_rows,
        num_columns=num_columns,
        panel_width=max(7.2, 0.95 * len(groups))
        if wide
        else {1: 5.2, 2: 3.6}.get(num_columns, 2.7),
        panel_height=3.0 if num_rows == 1 else 2.1,
        tick_lines=max((group_label(group).count("\n") + 1 for group in groups), default=1),
        legend_title=", ".join(text.header(param) for param in scene.plot.series) if labels else "",
        legend_labels=labels,
    )


def _panel(scene: Scene, palette: Palette, axes: Axes, row: int, column: int) -> None:
    rows = scene.panel(row, column)
    PAINTERS[scene.plot.kind](scene, palette, axes, rows)
    name = heading(
        (*scene.plot.rows, *scene.plot.columns), (*scene.down[row], *scene.across[column])
    )
    axes.set_title(name, fontsize=8.5, loc="left")
    if column == 0:
        axes.set_ylabel(scene.y_label, fontsize=8)
    if row == len(scene.down) - 1:
        named = scene.plot.x and text.header(scene.plot.x, axis=True)
        axes.set_xlabel(named or "timed round", fontsize=8)
    # Panels that show different passes or head dims of one thing share their scale; rounds do not.
    own = scene.plot.kind in ("rounds", "spread")
    _scale(scene, axes, scene.heights(rows if own else scene.rows))


def _scale(scene: Scene, axes: Axes, heights: Sequence[float]) -> None:
    positive = [height for height in heights if height > 0]
    if not positive:
        return
    low, high = min(positive), max(positive)
    log = True if scene.plot.kind == "roofline" else scene.plot.log_y
    if log is None:
        log = high / low > _WIDE
    free = BAND if scene.plot.kind == "lines" and scene.stopped else 0.0
    if scene.plot.line_at is not None:
        free = BAND  # For the numbers on the bars.
    scale_y(axes, log=log, low=low, high=high, free=free)
