"""The whole report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from cs336_systems.report.cells import Cell, Table
from cs336_systems.report.plots import Picture
from cs336_systems.report.readme import Gallery
from cs336_systems.report.tables import Section

_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def page(title: str, sections: Sequence[Section], gallery: Gallery) -> str:
    """Return the page: a list to navigate by, then every section with its tables and pictures."""
    links = "\n".join(
        f'<li><a href="#{escape(section.name)}">{escape(section.heading)}</a></li>'
        for section in sections
    )
    asset = files("cs336_systems.report")
    style = asset.joinpath("page.css").read_text(encoding="utf-8")
    script = asset.joinpath("page.js").read_text(encoding="utf-8")
    body = "\n".join(_section(section, gallery[section.name]) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav aria-label="Studies"><ul>
{links}
</ul></nav>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _section(section: Section, pictures: Sequence[Picture]) -> str:
    notes = "\n".join(f"<li>{_prose(note)}</li>" for note in section.notes)
    parts = [
        f'<section id="{escape(section.name)}">',
        f"<h2>{escape(section.heading)}</h2>",
        f"<p>{_prose(section.study.shows)}</p>",
        *map(_figure, pictures),
        *map(_table, section.tables),
        f'<ul class="notes">{notes}</ul>' if notes else "",
        *(f'<p class="stamp">Measured on: {_prose(line)}</p>' for line in section.stamp),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}"></figure>'
    )


def _table(table: Table) -> str:
    align = [' class="n"' if numeric else "" for numeric in table.numeric]
    heads = "".join(
        f'<th scope="col"{how}><button type="button">{escape(header)}</button></th>'
        for header, how in zip(table.headers, align, strict=True)
    )
    lines = "\n".join("<tr>" + "".join(map(_cell, row, align)) + "</tr>" for row in table.rows)
    return (
        f"<h3>{escape(table.title)}</h3>\n"
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _cell(cell: Cell, align: str) -> str:
    """Return a cell; one whose text is a plain number sorts by that, without a key of its own."""
    text = escape(cell.text)
    if align and _PLAIN_NUMBER.fullmatch(cell.text):
        return f"<td{align}>{text}</td>"
    key = f"{cell.sort:.7g}" if isinstance(cell.sort, float) else escape(str(cell.sort))
    return f'<td{align} data-sort="{key}">{text}</td>'


def _prose(line: str) -> str:
    """Return a line as HTML, its code spans included."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(line))
