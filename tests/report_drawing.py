"""Every picture of a file with the canvas it was drawn on, for tests to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from cs336_systems.report.canvas import Canvas
from cs336_systems.report.frame import load
from cs336_systems.report.palette import Palette
from cs336_systems.report.plots import pictures
from cs336_systems.report.tables import Section, sections


@dataclass
class Gallery:
    """The pictures of a file with the canvases that they were drawn on."""

    sections: list[Section]
    names: list[str]
    canvases: dict[str, Canvas]


def draw(folder: Path, data: dict[str, Any]) -> Gallery:
    """Draw every picture of a file and keep its canvas."""
    found = sections(load([fx.write(folder / "run.json", data)]))
    drawn: list[Canvas] = []

    def keep(canvas: Canvas) -> bytes:
        FigureCanvasAgg(canvas.figure).draw()
        drawn.append(canvas)
        return b"png"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canvas, "png", keep)
        palette = Palette([row for section in found for row in section.rows])
        names = [picture.name for section in found for picture in pictures(section, palette)]
    return Gallery(found, names, dict(zip(names, drawn, strict=True)))


def boxes_of(canvas: Canvas) -> list[tuple[str, Bbox]]:
    """Return what is written or drawn in a picture with the room that each takes."""
    renderer = FigureCanvasAgg(canvas.figure).get_renderer()
    boxes = [
        (f"panel {i}", axes.get_tightbbox(renderer))
        for i, axes in enumerate(axes for line in canvas.axes for axes in line)
    ]
    boxes += [("legend", legend.get_window_extent()) for legend in canvas.figure.legends]
    return boxes + [
        (text.get_text(), text.get_window_extent())
        for text in canvas.figure.texts
        if text.get_text()
    ]
