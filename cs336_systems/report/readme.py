"""The report's index, and the marked parts of a README that the report writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cs336_systems.errors import UsageError, bad
from cs336_systems.report.frame import Frame
from cs336_systems.report.headline import headline
from cs336_systems.report.plots import Picture
from cs336_systems.report.tables import Section

Gallery = Mapping[str, Sequence[Picture]]
"""The pictures of each section, by the section's name."""


def index(
    title: str, frame: Frame, sections: Sequence[Section], gallery: Gallery, out: Path
) -> str:
    """Return the index page: the headline, then links to every table, picture and source."""
    parts = [f"# {title}", "All of it on one page: [report.html](report.html).", "## Headline"]
    parts += [headline(sections), "## Studies", studies_table(sections, gallery, "")]
    sources = [f"- {_source_link(source.path, out)}" for source in frame.sources]
    parts += ["## Sources", "\n".join(dict.fromkeys(sources))]
    return "\n\n".join(parts) + "\n"


def studies_table(sections: Sequence[Section], gallery: Gallery, prefix: str) -> str:
    """Return the table of studies, its links starting with `prefix`."""
    lines = [
        "| study | hardware | cases | shows | tables | plots |",
        "|:--|:--|--:|:--|:--|:--|",
    ]
    for section in sections:
        table = f"{prefix}tables/{section.name}"
        plots = [
            f"[{picture.name.removeprefix(section.name + '_').replace('_', ' ')}]"
            f"({prefix}plots/{picture.name}.png)"
            for picture in gallery[section.name]
        ]
        lines.append(
            f"| {section.study.title} | {section.hardware.label} | {len(section.rows)} "
            f"| {section.study.shows} | [Markdown]({table}.md), [CSV]({table}.csv) "
            f"| {', '.join(plots) or 'none'} |"
        )
    return "\n".join(lines)


def _source_link(source: Path, out: Path) -> str:
    # A link that leaves the report's own surroundings would say where this machine keeps things.
    relative = os.path.relpath(source.resolve(), out.resolve())
    if relative.startswith(os.path.join("..", "..")):
        return f"`{source.name}`"
    return f"[{source.name}]({Path(relative).as_posix()})"


def fill(readme: Path, text: str, sections: Sequence[Section], gallery: Gallery, out: Path) -> str:
    """Return a README's text with its `headline` and `studies` parts written anew.

    Raises: UsageError for a marker that is missing, repeated or out of order.
    """
    folder = os.path.relpath(out.resolve(), readme.resolve().parent)
    prefix = "" if folder == "." else f"{Path(folder).as_posix()}/"
    parts = {
        "headline": headline(sections),
        "studies": studies_table(sections, gallery, prefix),
    }
    for name, part in parts.items():
        text = _replace(readme, text, name, part)
    return text


def _replace(readme: Path, text: str, name: str, part: str) -> str:
    begin, end = f"<!-- report:begin {name} -->", f"<!-- report:end {name} -->"
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise bad(f"report: {readme}", marker, "appear exactly once", text.count(marker))
    if text.index(end) < text.index(begin):
        raise UsageError(f"report: {readme}: {end} must come after {begin}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
