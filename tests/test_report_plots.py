"""Pictures: every point is drawn or named, nothing overlaps, equal series look alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import report_fixtures as fx
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from report_drawing import Gallery, boxes_of, draw

from cs336_systems.report.frame import load
from cs336_systems.report.palette import Palette
from cs336_systems.report.plots import pictures
from cs336_systems.report.scene import generic_plots, set_scene
from cs336_systems.report.spec import Plot
from cs336_systems.report.studies import STUDIES, index_of
from cs336_systems.report.tables import Section, sections


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    command = "pytest benchmarks/ --out=$OUT --sizes $SIZES " + "--contexts 128,256 " * 12
    data = fx.document(
        *fx.model_grid(), *fx.warmups(), *fx.attention_grid(), *fx.findings(), command=command
    )
    return draw(tmp_path_factory.mktemp("plots"), data)


def test_each_study_has_the_pictures_its_specification_names(gallery: Gallery) -> None:
    assert gallery.names == [
        "model_pass_time_by_size", "model_pass_time_by_context", "model_pass_share_of_peak",
        "model_pass_peak_memory", "warmup_rounds", "warmup_mean", "attention_grid_latency",
        "attention_grid_memory", "unlisted_time",
    ]  # fmt: skip


def test_nothing_overlaps_or_leaves_the_picture(gallery: Gallery) -> None:
    for name, canvas in gallery.canvases.items():
        width, height = canvas.figure.canvas.get_width_height()
        boxes = boxes_of(canvas)
        assert len(boxes) >= 3, name
        for i, (what, box) in enumerate(boxes):
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (name, what, box)
            for other, beside in boxes[i + 1 :]:
                overlap = Bbox.intersection(box, beside)
                shared = 0.0 if overlap is None else overlap.width * overlap.height
                assert shared < 1, (name, what, other)


def test_tick_labels_do_not_overlap(gallery: Gallery) -> None:
    for name, canvas in gallery.canvases.items():
        for axes in (axes for line in canvas.axes for axes in line):
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                shown = [label.get_window_extent() for label in labels if label.get_text()]
                pairs = pairwise(shown)
                assert not any(a.overlaps(b) for a, b in pairs), (name, axes.get_title(loc="left"))


def test_every_picture_is_stamped_and_titled(gallery: Gallery) -> None:
    for name, canvas in gallery.canvases.items():
        words = " ".join(" ".join(text.get_text() for text in canvas.figure.texts).split())
        assert "on NVIDIA H200" in words, name
        for part in ("driver 580.159.04", "torch 2.11.0", "commit 0123abcd", "--out=$OUT --sizes"):
            assert part in words, (name, part)


def test_axes_name_units(gallery: Gallery) -> None:
    labels = {
        name: (canvas.axes[0][0].get_ylabel(), canvas.axes[-1][0].get_xlabel())
        for name, canvas in gallery.canvases.items()
    }
    assert labels["model_pass_peak_memory"] == ("peak memory (GiB)", "model size")
    assert labels["attention_grid_latency"] == ("median (ms)", "sequence length (tokens)")
    assert labels["attention_grid_memory"][0] == "memory before backward (GiB)"
    assert labels["warmup_rounds"] == ("round (ms)", "timed round")


def test_bars_show_every_case_at_the_context_or_mark_its_outcome(gallery: Gallery) -> None:
    rows = [row for row in gallery.sections[0].rows if row["context"] == 1024]
    for what in ("time_by_size", "peak_memory", "share_of_peak"):
        panels = [line[0] for line in gallery.canvases[f"model_pass_{what}"].axes]
        bars = [bar for axes in panels for group in axes.containers for bar in group.patches]
        assert len(bars) == sum(row["status"] == "ok" for row in rows)
        marks = [text for axes in panels for text in axes.texts if text.get_text() == "OOM"]
        hatched = [
            patch
            for axes in panels
            for patch in axes.patches
            if isinstance(patch, Rectangle) and patch.get_hatch()
        ]
        assert len(marks) == len(hatched) == sum(row["status"] == "oom" for row in rows) == 6


def test_lines_show_every_case_and_mark_those_that_stopped(gallery: Gallery) -> None:
    rows = gallery.sections[2].rows
    canvas = gallery.canvases["attention_grid_latency"]
    lines = [line for panels in canvas.axes for axes in panels for line in axes.lines]
    points = sum(len(line.get_xdata()) for line in lines if line.get_marker() != "x")
    crosses = sum(len(line.get_xdata()) for line in lines if line.get_marker() == "x")
    assert points == sum(row["status"] == "ok" for row in rows) > 0
    # The one that no case was timed of is named above the panels instead.
    timed = {row["attention"] for row in rows if row["status"] == "ok"}
    assert crosses == sum(row["status"] != "ok" and row["attention"] in timed for row in rows) > 0
    words = " ".join(text.get_text() for text in canvas.figure.texts)
    assert "no time at all: flash_attn_4" in words
    ticks = [label.get_text() for label in canvas.axes[1][0].get_xticklabels()]
    assert ticks == ["256", "1k", "4k", "8k", "16k"]


def test_no_line_reaches_the_band_of_outcomes(gallery: Gallery) -> None:
    for axes in (axes for line in gallery.canvases["attention_grid_latency"].axes for axes in line):
        top = axes.transAxes.transform((0, 0.87))[1]
        drawn = [line for line in axes.lines if line.get_marker() != "x" and len(line.get_xdata())]
        assert drawn
        for line in drawn:
            assert axes.transData.transform(line.get_xydata())[:, 1].max() < top


def test_rounds_are_drawn_in_order(gallery: Gallery) -> None:
    row = next(r for r in gallery.sections[1].rows if r["size"] == "small" and r["warmup"] == 0)
    line = gallery.canvases["warmup_rounds"].axes[0][0].lines[0]
    assert list(line.get_xdata()) == list(range(1, 11))
    assert list(line.get_ydata()) == row["data_ms"]
    assert line.get_ydata()[0] == pytest.approx(12 * 20, rel=0.1)


def test_a_series_keeps_its_colour_in_every_picture(gallery: Gallery) -> None:
    looks = []
    for what in ("time_by_size", "share_of_peak", "peak_memory"):
        (legend,) = gallery.canvases[f"model_pass_{what}"].figure.legends
        texts = [text.get_text() for text in legend.get_texts()]
        colours = [patch.get_facecolor() for patch in legend.get_patches()]
        looks.append(dict(zip(texts, colours, strict=True)))
    assert looks[0] == looks[1] == looks[2]
    assert len(set(looks[0].values())) == len(looks[0]) == 7


def test_colours_do_not_depend_on_which_rows_a_picture_keeps() -> None:
    rows: list[Any] = [{"case": {"p": value}, "p": value} for value in "abcdefghijkl"]
    palette = Palette(rows)
    looks = [palette.line(("p",), (value,)) for value in "abcdefghijkl"]
    assert len(set(looks)) == 12
    assert Palette(rows).line(("p",), ("c",)) == looks[2]


def _rows(tmp_path: Path, *entries: dict[str, Any]) -> Section:
    return sections(load([fx.write(tmp_path / "run.json", fx.document(*entries))]))[0]


def test_generic_study_sweeps_its_longest_numeric_parameter(tmp_path: Path) -> None:
    cases = [{"kind": k, "n": n, "m": m} for k in "ab" for n in (1, 2, 4, 8) for m in (1, 2)]
    section = _rows(tmp_path, *(fx.timed("s", case, 0.01) for case in cases))
    index = index_of(section.study, section.rows)
    (plot,) = generic_plots(index, section.rows)
    scene = set_scene(plot, index, section.rows)
    assert scene is not None
    assert (scene.plot.x, scene.plot.series, scene.plot.log_x) == ("n", ("kind", "m"), True)
    assert scene.series == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_study_without_a_sweep_or_a_time_has_no_picture(tmp_path: Path) -> None:
    section = _rows(tmp_path, fx.timed("s", {"kind": "a"}, 0.01))
    assert pictures(section, Palette(section.rows)) == []
    stopped = [fx.untimed("s", {"n": n}, "oom", reason="asked for 9 GiB") for n in (1, 2)]
    section = _rows(tmp_path, *stopped)
    assert pictures(section, Palette(section.rows)) == []


def test_too_many_panels_and_series_are_cut_and_said(tmp_path: Path) -> None:
    cases = [{"p": p, "s": s, "n": n} for p in range(20) for s in range(15) for n in (1, 2)]
    section = _rows(tmp_path, *(fx.timed("s", case, 0.01) for case in cases))
    plot = Plot(what="w", kind="lines", title="t", x="n", y="median_ms", series=("s",), rows=("p",))
    scene = set_scene(plot, ["p", "s", "n"], section.rows)
    assert scene is not None
    assert (len(scene.down), len(scene.series)) == (12, 12)
    assert scene.said == [
        "first 12 of 15 series, all are in the table",
        "first 12 of 20 rows of panels, all are in the table",
    ]


def test_memory_before_backward_is_one_point_for_both_passes(tmp_path: Path) -> None:
    case = {"attention": "flash", "d": 64, "dtype": "bf16"}
    entries = []
    for seq in (256, 512):
        metrics = {"before_backward_bytes": 2**20 * seq}
        backward = {**case, "seq": seq, "pass": "backward"}
        entries.append(fx.timed("attention_grid", backward, 0.02, metrics=metrics))
        entries.append(fx.timed("attention_grid", {**backward, "pass": "forward"}, 0.01))
    section = _rows(tmp_path, *entries)
    plots = STUDIES["attention_grid"].plots
    assert plots is not None
    scene = set_scene(plots[1], index_of(section.study, section.rows), section.rows)
    assert scene is not None
    assert [scene.height(row) for row in scene.rows] == [256, 512]
    assert scene.y_label == "memory before backward (MiB)"


def test_drawing_leaves_no_trace_in_the_library(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    section = _rows(tmp_path, *(fx.timed("s", {"n": n}, 0.01) for n in (1, 2)))
    (picture,) = pictures(section, Palette(section.rows))
    assert picture.png.startswith(b"\x89PNG")
    assert picture.png == pictures(section, Palette(section.rows))[0].png
    assert dict(matplotlib.rcParams) == before


def test_names_the_font_lacks_and_formulas_are_drawn_as_text(tmp_path: Path) -> None:
    entries = [fx.timed("s", {"n": n, "k": name}, 0.01) for n in (1, 2) for name in ("$a^$", "語")]
    section = _rows(tmp_path, *entries)
    (picture,) = pictures(section, Palette(section.rows))
    assert picture.png.startswith(b"\x89PNG")
