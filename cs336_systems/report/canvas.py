"""A picture's frame: panels laid out in inches, title above, legend beside, stamp below."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from cs336_systems.report.text import plain

_DPI = 110
_LEFT, _RIGHT, _GAP_X, _GAP_Y, _AXIS_ROOM = 0.85, 0.2, 0.62, 0.5, 0.55
_LINE = 0.14
_LETTER = 0.068
_GREY = "#555555"


@dataclass
class Canvas:
    """A figure whose panels are addressed by row and column; sizes are inches."""

    title: str
    subtitle: str
    stamp: Sequence[str]
    num_rows: int
    num_columns: int
    panel_width: float
    panel_height: float
    legend_title: str
    legend_labels: Sequence[str]
    tick_lines: int = 1
    """Lines of text in the longest label of a panel's x axis."""
    figure: Figure = field(init=False)
    axes: list[list[Axes]] = field(init=False)

    def __post_init__(self) -> None:
        longest = max(map(len, (self.legend_title, *self.legend_labels)))
        self._legend_width = longest * _LETTER + 0.75 if self.legend_labels else 0.0
        grid = self.num_columns * (self.panel_width + _GAP_X) - _GAP_X
        width = max(_LEFT + grid + self._legend_width + _RIGHT, 6.5)
        subtitle = _wrap([self.subtitle], width, 8.5)
        stamp = _wrap(self.stamp, width, 6.5)
        top = 0.45 + 0.17 * len(subtitle) + (0.25 if self.num_rows * self.num_columns > 1 else 0.1)
        self._gap_y = _GAP_Y + _LINE * (self.tick_lines - 1)
        bottom = _AXIS_ROOM + _LINE * (self.tick_lines - 1 + len(stamp)) + 0.1
        grid_height = self.num_rows * (self.panel_height + self._gap_y) - self._gap_y
        height = top + grid_height + bottom
        self.figure = Figure(figsize=(width, height), dpi=_DPI)
        self._write(subtitle, stamp, width, height)
        self._legend_at = ((_LEFT + grid + 0.15) / width, 1 - top / height)
        self.axes = [
            [self._panel(row, column, width, height, top) for column in range(self.num_columns)]
            for row in range(self.num_rows)
        ]

    def _panel(self, row: int, column: int, width: float, height: float, top: float) -> Axes:
        left = _LEFT + column * (self.panel_width + _GAP_X)
        bottom = height - top - row * (self.panel_height + self._gap_y) - self.panel_height
        box = (
            left / width,
            bottom / height,
            self.panel_width / width,
            self.panel_height / height,
        )
        axes = self.figure.add_axes(box)
        axes.tick_params(labelsize=7.5, length=3)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def _write(
        self, subtitle: Sequence[str], stamp: Sequence[str], width: float, height: float
    ) -> None:
        def at(inches_down: float) -> float:
            return 1 - inches_down / height

        left = 0.12 / width
        self.figure.text(left, at(0.1), self.title, fontsize=12, weight="bold", va="top")
        self.figure.text(left, at(0.36), "\n".join(subtitle), fontsize=8.5, va="top", color=_GREY)
        self.figure.text(
            left, 0.06 / height, "\n".join(stamp), fontsize=6.5, va="bottom", color=_GREY
        )

    def legend(self, handles: Sequence[Artist]) -> None:
        """Put the legend to the right of the panels."""
        self.figure.legend(
            handles=list(handles),
            labels=list(self.legend_labels),
            title=self.legend_title,
            loc="upper left",
            bbox_to_anchor=self._legend_at,
            borderaxespad=0.0,
            fontsize=8,
            title_fontsize=8,
            frameon=False,
            alignment="left",
        )

    def png(self) -> bytes:
        """Return the picture; the same data gives the same bytes."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        # A plot has few colours: a palette makes the file, and the page, a third as large.
        picture = Image.open(buffer).convert("RGB").quantize(255, dither=Image.Dither.NONE)
        small = io.BytesIO()
        picture.save(small, format="png", optimize=True)
        return small.getvalue()


@contextmanager
def drawing() -> Iterator[None]:
    """Draw under the report's settings: a command's dollar signs are no formula."""
    settings: Any = {"hatch.linewidth": 0.6, "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that the font lacks is shown as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _wrap(lines: Sequence[str], width: float, points: float) -> list[str]:
    # A letter of the default font is a little over half as wide as its size in points.
    columns = int((width - 0.3) * 72 / (points * 0.56))
    wrapper = textwrap.TextWrapper(columns, break_on_hyphens=False)
    return [part for line in lines for part in wrapper.wrap(line)]


def log_ticks_at(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic with plain labels at the swept values themselves."""
    axes.set_xscale("log")
    step = -(-len(values) // 8)
    axes.xaxis.set_major_locator(FixedLocator(list(values[::step])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def scale_y(axes: Axes, *, log: bool, low: float, high: float, free: float) -> None:
    """Set a panel's y axis from zero or logarithmic; `free` is the part kept empty at its top."""
    if log:
        axes.set_yscale("log")
        bottom, top = low / 1.8, high * 1.8
        axes.set_ylim(bottom, top * (top / bottom) ** (free / (1 - free)))
        # A narrow range would show one tick or none with powers of ten alone.
        subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.08 / (1 - free))
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
