"""The pictures of one study on one hardware, drawn as its specification says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from cs336_systems.report import text
from cs336_systems.report.canvas import Canvas, drawing, scale_y
from cs336_systems.report.frame import Row
from cs336_systems.report.guides import guide_entries
from cs336_systems.report.heatmap import DOWN
from cs336_systems.report.painters import BAND, group_label, handle, stopped_handle
from cs336_systems.report.painters_parallel import ALL_PAINTERS, beside_entry, part_entries
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
    entries = _entries(scene, palette)
    canvas = _canvas(scene, section, [name for name, _ in entries])
    for row, line in enumerate(canvas.axes):
        for column, axes in enumerate(line):
            _panel(scene, palette, axes, row, column)
    if entries:
        canvas.legend([artist for _, artist in entries])
    return canvas.png()


def _entries(scene: Scene, palette: Palette) -> list[tuple[str, Artist]]:
    """Return the legend's entries."""
    kind = scene.plot.kind
    if kind in ("spread", "heatmap"):
        return []  # An axis already names the series.
    if kind in ("stack", "timeline"):
        return [*part_entries(scene), *beside_entry(scene)]
    entries = [(label(wanted), handle(scene, palette, wanted)) for wanted in scene.series if wanted]
    if scene.stopped and kind in ("bars", "lines"):
        entries.append((_STOPPED, stopped_handle(scene)))
    return [*entries, *beside_entry(scene), *guide_entries(scene)]


def _canvas(scene: Scene, section: Section, labels: Sequence[str]) -> Canvas:
    num_rows, num_columns = len(scene.down), len(scene.across)
    in_groups = scene.plot.kind in ("bars", "stack")
    groups = values_of(scene.plot.x, scene.rows) if in_groups else []
    return Canvas(
        title=f"{scene.plot.title} on {section.hardware.label}",
        subtitle=", ".join(scene.said),
        stamp=section.brief_stamp,
        num_rows=num_rows,
        num_columns=num_columns,
        panel_width=_panel_width(scene, len(groups)),
        panel_height=_panel_height(scene),
        tick_lines=max((group_label(group).count("\n") + 1 for group in groups), default=1),
        legend_title=_legend_title(scene) if labels else "",
        legend_labels=labels,
    )


def _panel_width(scene: Scene, num_groups: int) -> float:
    num_columns = len(scene.across)
    if num_columns == 1 and num_groups:
        return max(7.2, 0.95 * num_groups)
    if scene.plot.kind == "timeline":
        return 8.0
    return {1: 5.2, 2: 3.6}.get(num_columns, 2.7)


def _panel_height(scene: Scene) -> float:
    if scene.plot.kind == "timeline":
        return max(1.2, 0.45 * len(scene.series))
    return 3.0 if len(scene.down) == 1 else 2.1


def _legend_title(scene: Scene) -> str:
    if scene.plot.kind in ("stack", "timeline"):
        return ""
    return ", ".join(text.header(param) for param in scene.plot.series)


def _panel(scene: Scene, palette: Palette, axes: Axes, row: int, column: int) -> None:
    rows = scene.panel(row, column)
    ALL_PAINTERS[scene.plot.kind](scene, palette, axes, rows)
    name = heading(
        (*scene.plot.rows, *scene.plot.columns), (*scene.down[row], *scene.across[column])
    )
    axes.set_title(name, fontsize=8.5, loc="left")
    if column == 0 and scene.plot.kind != "timeline":
        down = text.header(DOWN, axis=True)
        axes.set_ylabel(down if scene.plot.kind == "heatmap" else scene.y_label, fontsize=8)
    if row == len(scene.down) - 1:
        unnamed = {"timeline": "time in the step (ms)", "stack": ""}
        named = scene.plot.x and text.header(scene.plot.x, axis=True)
        axes.set_xlabel(unnamed.get(scene.plot.kind, named or "timed round"), fontsize=8)
    # Panels that show different passes or head dims of one thing share their scale; rounds do not.
    own = scene.plot.kind in ("rounds", "spread")
    _scale(scene, axes, scene.heights(rows if own else scene.rows))


def _scale(scene: Scene, axes: Axes, heights: Sequence[float]) -> None:
    positive = [height for height in heights if height > 0]
    if not positive or scene.plot.kind == "heatmap":
        return
    low, high = min(positive), max(positive)
    log = True if scene.plot.kind == "roofline" else scene.plot.log_y
    if log is None:
        log = high / low > _WIDE
    free = BAND if scene.plot.kind == "lines" and scene.stopped else 0.0
    if scene.plot.line_at is not None:
        free = BAND  # For the numbers on the bars.
    scale_y(axes, log=log, low=low, high=high, free=free)
