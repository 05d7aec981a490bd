"""The files of one experiment: all cases as CSV, its pictures, and a report in Markdown.

A picture that has nothing to show says so, so that the same files are there after every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cs336_systems.errors import UsageError, bad
from cs336_systems.report.canvas import Canvas, drawing
from cs336_systems.report.frame import Frame, load
from cs336_systems.report.palette import Palette
from cs336_systems.report.plots import Picture, pictures
from cs336_systems.report.publish import replace_files
from cs336_systems.report.spec import Plot
from cs336_systems.report.tables import Section, markdown, sections


def write_experiment(files: Iterable[Path], study: str, out: Path) -> list[Path]:
    """Write `<study>_results.csv`, `<study>_<picture>.png` and `<study>_report.md`; return them.

    Raises: UsageError for files that hold no case of the study, or a folder that refuses.
    """
    frame = load(files)
    found = [section for section in sections(frame) if section.study.name == study]
    if len(found) != 1:
        raise bad("report", study, "be measured on one kind of hardware", len(found))
    made = _files(frame, found[0], study, out)
    try:
        replace_files({out: made})
    except OSError as error:
        where = error.filename or out
        raise UsageError(f"report: {where}: cannot be written: {error.strerror}") from None
    return list(made)


def _files(frame: Frame, section: Section, study: str, out: Path) -> dict[Path, bytes]:
    drawn = {picture.name: picture for picture in pictures(section, Palette(section.rows))}
    shown = []
    for plot in section.study.plots or ():
        name = f"{study}_{plot.what}"
        shown.append(drawn.get(name) or _blank(section, plot, name))
    files = {out / f"{study}_results.csv": frame.csv(section.rows).encode()}
    files |= {out / f"{picture.name}.png": picture.png for picture in shown}
    titles = {f"{picture.name}.png": picture.title for picture in shown}
    files[out / f"{study}_report.md"] = markdown(section, titles).encode()
    return files


def _blank(section: Section, plot: Plot, name: str) -> Picture:
    title = f"{plot.title} on {section.hardware.label}"
    with drawing():
        canvas = Canvas(
            title=title,
            subtitle="",
            stamp=section.brief_stamp,
            num_rows=1,
            num_columns=1,
            panel_width=5.2,
            panel_height=1.0,
            legend_title="",
            legend_labels=(),
        )
        axes = canvas.axes[0][0]
        axes.set_axis_off()
        words = "nothing to show: the report says why"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, fontsize=9)
        return Picture(name=name, title=title, png=canvas.png())
