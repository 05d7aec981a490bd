"""Tables, headline and README parts: units, outcomes in words, order, and nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fx
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.report.frame import load
from cs336_systems.report.headline import headline
from cs336_systems.report.readme import fill, index
from cs336_systems.report.studies import order_key
from cs336_systems.report.tables import Section, markdown, sections
from cs336_systems.report.text import header, plain, significant

MODEL = {
    "size": "small",
    "context": 256,
    "precision": "fp32",
    "compile": "eager",
    "pass": "forward",
}


def made(tmp_path: Path, *entries: dict[str, Any], **options: Any) -> list[Section]:
    """Return the sections of a file of some entries."""
    return sections(load([fx.write(tmp_path / "run.json", fx.document(*entries, **options))]))


def cells(section: Section, title: str) -> list[dict[str, str]]:
    """Return one of a section's tables as text by heading."""
    table = next(table for table in section.tables if table.title == title)
    return [
        dict(zip(table.headers, [cell.text for cell in row], strict=True)) for row in table.rows
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5678, "1,235"),
        (12345.678, "12,350"),
        (123.456, "123.5"),
        (9.99999, "10.00"),
        (0.0123456, "0.01235"),
        (1.23456e-7, "1.235e-07"),
        (-2.5, "-2.500"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@given(st.floats(min_value=1e-12, max_value=1e15))
@example(0.99999)
@example(9999.5)
def test_written_number_is_the_number_to_four_digits(value: float) -> None:
    assert float(significant(value).replace(",", "")) == pytest.approx(value, rel=5.01e-4)


@pytest.mark.parametrize(
    ("value", "text"), [(128, "128"), (1024, "1k"), (16384, "16k"), (2000, "2k"), (0.05, "0.05")]
)
def test_ticks_are_plain(value: float, text: str) -> None:
    assert plain(value) == text


def test_headings_name_units() -> None:
    assert header("median_ms") == "median (ms)"
    assert header("metrics.saved_bytes", "MiB") == "saved for backward (MiB)"
    assert header("metrics.copy_us") == "copy (us)"
    assert header("metrics.bytes_per_s") == "bytes/s"
    assert header("counts.operators") == "operators"


def test_sizes_are_in_their_own_order_and_numbers_in_theirs() -> None:
    sizes = ["xl", "2.7b", "small", "tiny", "large", "debug", "medium", "other"]
    found = sorted(sizes, key=lambda size: order_key("size", size))
    assert found == ["tiny", "debug", "small", "medium", "large", "xl", "2.7b", "other"]
    assert sorted([1024, 128, None, "x"], key=lambda value: order_key("n", value))[:2] == [
        128,
        1024,
    ]


def test_cases_without_a_time_say_why(tmp_path: Path) -> None:
    entries = [
        fx.timed("model_pass", MODEL, 0.01),
        fx.untimed("model_pass", {**MODEL, "size": "xl"}, "oom", reason="asked for 9 GiB"),
        fx.untimed("model_pass", {**MODEL, "size": "2.7b"}, "oom", reason="asked for 9 GiB"),
        fx.untimed("model_pass", {**MODEL, "size": "large"}, "skipped", reason="needs 2 GPUs"),
        fx.untimed("model_pass", {**MODEL, "size": "medium"}, "not_installed", reason="needs x"),
    ]
    (section,) = made(tmp_path, *entries)
    times = [row["median (ms)"] for row in cells(section, "All cases")]
    assert times == ["10.00", "not installed", "skipped", "OOM", "OOM"]
    pivot = cells(section, "Median ms per pass")
    assert [row["forward"] for row in pivot] == times
    reasons = [note for note in section.notes if note.startswith(("OOM", "skipped", "not"))]
    assert len(reasons) == 3
    assert reasons[2].startswith("OOM: asked for 9 GiB (`")
    assert "size=xl" in reasons[2]
    assert "size=2.7b" in reasons[2]
    assert "<" not in markdown(section)


def test_study_without_any_time_still_shows_its_outcome(tmp_path: Path) -> None:
    (section,) = made(tmp_path, fx.untimed("s", {"n": 1}, "oom", reason="asked for 9 GiB"))
    (row,) = cells(section, "All cases")
    assert row == {"n": "1", "median (ms)": "OOM"}


def test_every_case_is_in_the_table_and_the_pivots_of_its_study(tmp_path: Path) -> None:
    entries = [*fx.model_grid(), *fx.attention_grid(), *fx.findings()]
    for section in made(tmp_path, *entries):
        assert len(section.tables[-1].rows) == len(section.rows)
        if section.study.pivots:
            pivoted = [
                cell
                for table in section.tables[:-1]
                for row in table.rows
                for cell, head in zip(row, table.headers, strict=True)
                if cell.text != "-" and head.startswith(("d=", "for", "full"))
            ]
            assert len(pivoted) == len(section.rows)


def test_pivot_does_not_fold_a_parameter_it_does_not_know(tmp_path: Path) -> None:
    entries = [fx.timed("model_pass", {**MODEL, "batch": n}, 0.01 * n) for n in (1, 2)]
    (section,) = made(tmp_path, *entries)
    pivot = cells(section, "Median ms per pass")
    assert [(row["batch"], row["forward"]) for row in pivot] == [("1", "10.00"), ("2", "20.00")]


def test_facts_and_exact_counts_are_columns(tmp_path: Path) -> None:
    facts = {"loss": "float32"}
    entry = fx.untimed(
        "autocast_dtypes", {"dtype": "bf16"}, "ok", facts=facts, counts={"ops": 12345}
    )
    (section,) = made(tmp_path, entry)
    assert cells(section, "All cases") == [{"dtype": "bf16", "ops": "12,345", "loss": "float32"}]


def test_mixed_clocks_get_a_column_and_one_clock_a_note(tmp_path: Path) -> None:
    entries = [fx.timed("s", {"n": 1}, 0.01), fx.timed("s", {"n": 2}, 0.01, clock="gpu_ms")]
    (section,) = made(tmp_path, *entries)
    assert [row["clock"] for row in cells(section, "All cases")] == ["wall_ms", "gpu_ms"]
    (section,) = made(tmp_path, entries[1])
    assert "clock" not in cells(section, "All cases")[0]
    assert section.notes[0].startswith("Clock: `gpu_ms`")


def test_sections_are_stamped_and_kept_apart_by_hardware(tmp_path: Path) -> None:
    data = [fx.timed("s", {"processes": 1}, 0.01)]
    files = [
        fx.write(tmp_path / f"{device['kind']}.json", fx.document(*data, device=device))
        for device in (fx.GPU, {**fx.GPU, "count": 8, "kind": "rocm"}, fx.CPU)
    ]
    found = sections(load(files))
    assert [section.name for section in found] == [
        "s_nvidia-h200", "s_8-x-nvidia-h200", "s_example-cpu-9000",
    ]  # fmt: skip
    stamp = found[0].stamp[0]
    for part in ("NVIDIA H200", "700 W", "580.159", "CUDA 13.0", "torch 2.11", "triton 3.6.0"):
        assert part in stamp
    assert "commit 0123abcd; made by `pytest benchmarks/ --sizes small,2.7b`" in stamp
    assert "driver" not in found[2].stamp[0]
    assert "8 x NVIDIA H200" in found[1].stamp[0]


def test_a_case_without_processes_ran_on_one_device_of_many(tmp_path: Path) -> None:
    data = [fx.timed("single", {"n": 1}, 0.01), fx.timed("several", {"ranks": 2}, 0.01)]
    file = fx.write(tmp_path / "a.json", fx.document(*data, device={**fx.GPU, "count": 2}))
    labels = {section.name: section.hardware.label for section in sections(load([file]))}
    assert labels == {"single": "NVIDIA H200", "several": "2 x NVIDIA H200"}


def test_dirty_tree_and_throttling_are_said(tmp_path: Path) -> None:
    entry = fx.timed("s", {"n": 1}, 0.01, conditions={"throttle": ["none", "SwPowerCap"]})
    data = fx.document(entry)
    data["commit_info"]["dirty"] = True
    (section,) = sections(load([fx.write(tmp_path / "run.json", data)]))
    assert "commit 0123abcd+dirty" in section.stamp[0]
    assert "The device held its clocks down in 1 of 1 cases: SwPowerCap." in section.notes


def test_cells_cannot_break_the_table(tmp_path: Path) -> None:
    (section,) = made(tmp_path, fx.timed("accumulation", {"variant": "a|b\n<c>*"}, 0.01))
    line = next(line for line in markdown(section).splitlines() if line.startswith("| a"))
    assert r"a\|b &lt;c>\*" in line


def test_headline_shows_the_fullest_context_and_the_faster_compilation(tmp_path: Path) -> None:
    entries = fx.model_grid()
    entries += [fx.timed("model_pass", {**MODEL, "context": 4096}, 1.0)]
    lines = headline(made(tmp_path, *entries)).splitlines()
    assert lines[0].startswith("Median ms of each pass at context 1024 on NVIDIA H200, fp32 eager")
    assert "(the faster of blocks and model)" in lines[0]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines[2:9]]
    assert rows[0] == [
        "size", "forward (ms)", "forward + backward (ms)", "full step (ms)", "speed-up (x)",
        "tokens/s", "share of peak (%)", "peak memory (GiB)",
    ]  # fmt: skip
    assert [row[0] for row in rows[2:]] == list(fx.SIZES)
    assert rows[2][3:5] == ["107.0 -> 21.39", "5.000"]
    assert rows[6][3:5] == ["OOM -> 577.6", "-"]
    assert lines[-1].startswith("<sub>NVIDIA H200; power limit 700 W;")


def test_headline_of_a_run_without_compilation_has_one_time_per_pass(tmp_path: Path) -> None:
    text = headline(made(tmp_path, fx.timed("model_pass", MODEL, 0.01), device=fx.CPU))
    assert text.startswith(
        "Median ms of each pass at context 256 on Example CPU 9000, fp32 eager.\n"
    )
    assert "| small  |          10.00 |" in text
    assert "->" not in text
    assert "speed-up" not in text


def test_headline_says_when_there_is_nothing_to_show(tmp_path: Path) -> None:
    expected = "No pass of the language model was timed in this report."
    assert headline(made(tmp_path, fx.timed("s", {"n": 1}, 0.01))) == expected
    stopped = fx.untimed("model_pass", MODEL, "oom", reason="asked for 9 GiB")
    assert headline(made(tmp_path, stopped)) == expected


README = (
    "# Us\r\n<!-- report:begin headline -->old<!-- report:end headline -->\r\nmiddle\n"
    "<!-- report:begin studies -->\n<!-- report:end studies -->\nend\n"
)


def test_readme_parts_are_replaced_and_the_rest_is_untouched(tmp_path: Path) -> None:
    found = made(tmp_path, fx.timed("model_pass", MODEL, 0.01))
    gallery: dict[str, list[Any]] = {section.name: [] for section in found}
    paths = (tmp_path / "README.md", tmp_path / "reports")
    text = fill(paths[0], README, found, gallery, paths[1])
    assert text.startswith("# Us\r\n<!-- report:begin headline -->\n\nMedian ms of each pass")
    assert "old" not in text
    assert "<!-- report:end headline -->\r\nmiddle\n" in text
    assert "[CSV](reports/tables/model_pass.csv)" in text
    assert text.endswith("<!-- report:end studies -->\nend\n")
    assert fill(paths[0], text, found, gallery, paths[1]) == text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (("<!-- report:end studies -->", ""), "end studies --> must appear exactly once, got 0"),
        (("middle", "<!-- report:begin headline -->"), "must appear exactly once, got 2"),
        (("<!-- report:begin headline -->old", ""), "begin headline --> must appear exactly once"),
    ],
)
def test_readme_without_its_markers_is_refused(
    tmp_path: Path, spoil: tuple[str, str], message: str
) -> None:
    found = made(tmp_path, fx.timed("s", {"n": 1}, 0.01))
    with pytest.raises(UsageError, match=message):
        fill(tmp_path / "R.md", README.replace(*spoil), found, {found[0].name: []}, tmp_path)


def test_readme_markers_out_of_order_are_refused(tmp_path: Path) -> None:
    found = made(tmp_path, fx.timed("s", {"n": 1}, 0.01))
    text = "<!-- report:end headline --><!-- report:begin headline -->"
    with pytest.raises(UsageError, match="must come after"):
        fill(tmp_path / "R.md", text, found, {found[0].name: []}, tmp_path)


def test_index_links_sources_only_nearby(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = fx.document(fx.timed("s", {"n": 1}, 0.01))
    near = fx.write(tmp_path / "data" / "near.json", data)
    frame = load([near])
    found = sections(frame)
    gallery: dict[str, list[Any]] = {found[0].name: []}
    text = index("T", frame, found, gallery, tmp_path / "reports")
    assert "- [near.json](../data/near.json)" in text
    deep = index("T", frame, found, gallery, tmp_path / "a" / "b" / "c")
    assert "- `near.json`" in deep
    assert str(tmp_path) not in text + deep
