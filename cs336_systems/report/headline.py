"""The one table a README shows: the model's passes at one context, plain against fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from cs336_systems.report import text
from cs336_systems.report.cells import Cell, Table, cell, markdown_table, time_cell
from cs336_systems.report.frame import Row
from cs336_systems.report.source import stamp
from cs336_systems.report.studies import fullest, values_of, word
from cs336_systems.report.tables import Section

_PASSES = ("forward", "forward_backward", "full_step")
_ARROW = "->"


def headline(sections: Sequence[Section]) -> str:
    """Return the headline in Markdown: a table, what it says and its stamp, for each hardware."""
    blocks = [_block(section) for section in sections if section.study.name == "model_pass"]
    shown = [block for block in blocks if block]
    return "\n\n".join(shown) or "No pass of the language model was timed in this report."


def _block(section: Section) -> str | None:
    passes = [name for name in _PASSES if any(row.get("pass") == name for row in section.rows)]
    rows = [row for row in section.rows if row.get("pass") in passes and "size" in row["case"]]
    if not any(row["median_ms"] is not None for row in rows):
        return None
    context = fullest("context", "size", rows)
    rows = [row for row in rows if row.get("context") == context]
    plain_name, fast_name, is_plain, is_fast = _variants(rows)
    table = _table(rows, passes, is_plain, is_fast if fast_name else None)
    compared = f"{plain_name} {_ARROW} {fast_name}" if fast_name else plain_name
    more = ""
    if len(table.headers) > 1 + len(passes):
        by = f" in {fast_name.partition(' (')[0]}" if fast_name else ""
        more = f"; the last columns are the {word(passes[-1])}'s{by}"
    made_by = stamp((row["source"] for row in rows), section.hardware, brief=True)
    at = f" at context {context}" if context is not None else ""
    lines = [
        f"Median ms of each pass{at} on {section.hardware.label}, {compared}{more}.",
        markdown_table(table),
        "\n".join(f"<sub>{line}</sub>" for line in made_by),
    ]
    return "\n\n".join(lines)


_Test = Callable[[Row], bool]


def _variants(rows: Sequence[Row]) -> tuple[str, str | None, _Test, _Test]:
    """Return the names and the tests of the plain and the fast variants that were run."""

    def is_plain(row: Row) -> bool:
        return row.get("precision") == "fp32" and row.get("compile") in ("eager", None)

    def compiled(row: Row) -> bool:
        return row.get("compile") in ("blocks", "model")

    fast: tuple[tuple[str, _Test], ...] = (
        ("bf16 + compiled", lambda row: row.get("precision") == "bf16" and compiled(row)),
        ("fp32 + compiled", lambda row: row.get("precision") == "fp32" and compiled(row)),
        ("bf16 eager", lambda row: row.get("precision") == "bf16" and not compiled(row)),
    )
    for name, test in fast:
        if any(map(test, rows)):
            how = " (the faster of blocks and model)" if "compiled" in name else ""
            return "fp32 eager", name + how, is_plain, test
    if any(map(is_plain, rows)):
        return "fp32 eager", None, is_plain, is_plain
    return "the fastest variant", None, lambda row: True, is_plain


def _table(
    rows: Sequence[Row], passes: Sequence[str], is_plain: _Test, is_fast: _Test | None
) -> Table:
    lines = [
        _line([row for row in rows if row["size"] == size], passes, is_plain, is_fast)
        for size in values_of("size", rows)
    ]
    last = ("speedup", "tokens_per_s", "share_of_peak", "peak_gib")
    headers = ["size", *(f"{word(name)} (ms)" for name in passes), *map(text.header, last)]
    filled = [any(line[i].text != text.NOTHING for line in lines) for i in range(len(headers))]
    return Table(
        title="Headline",
        headers=list(compress(headers, filled)),
        numeric=list(compress([False, *(True for _ in headers[1:])], filled)),
        rows=[list(compress(line, filled)) for line in lines],
    )


def _line(
    rows: Sequence[Row], passes: Sequence[str], is_plain: _Test, is_fast: _Test | None
) -> list[Cell]:
    times, plain, fast = [], None, None
    for name in passes:
        of_pass = [row for row in rows if row["pass"] == name]
        plain = _best([row for row in of_pass if is_plain(row)])
        fast = _best([row for row in of_pass if is_fast(row)]) if is_fast else plain
        both = [plain] if is_fast is None else [plain, fast]
        times.append(Cell(f" {_ARROW} ".join(time_cell(row).text for row in both), ""))
    speedup = None
    if is_fast and plain and fast and plain["median_ms"] and fast["median_ms"]:
        speedup = plain["median_ms"] / fast["median_ms"]
    rates = [cell(fast[name] if fast else None) for name in ("tokens_per_s", "share_of_peak")]
    peak = cell(fast["peak_gib"]) if fast and fast["status"] == "ok" else time_cell(fast)
    return [Cell(word(rows[0]["size"]), ""), *times, cell(speedup), *rates, peak]


def _best(rows: Sequence[Row]) -> Row | None:
    """Return the fastest row; where none was timed, one that says why."""
    timed = [row for row in rows if row["median_ms"] is not None]
    if timed:
        return min(timed, key=lambda row: row["median_ms"])
    return rows[0] if rows else None
