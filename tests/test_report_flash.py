"""The studies of fused attention in the report: ratios, roofline, errors, panels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import flash_fixtures as ff
import pytest
import report_fixtures as fx
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from report_drawing import Gallery, boxes_of, draw
from test_report_tables import cells, made

from cs336_systems.report.__main__ import main
from cs336_systems.report.source import Roof
from cs336_systems.report.spec import Plot
from cs336_systems.report.studies import further, order_key
from cs336_systems.report.tables import Section

OTHERS = ("flex", "sdpa", "sdpa_cudnn", "sdpa_flash")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return draw(tmp_path_factory.mktemp("flash"), fx.document(*ff.everything()))


def test_studies_and_pictures_in_order(gallery: Gallery) -> None:
    assert [section.name for section in gallery.sections] == [
        "flash_sweep", "attention_shapes", "attention_harness", "attention_host_bound",
        "attention_fp32", "attention_error", "hopper_ladder",
    ]  # fmt: skip
    assert gallery.names == [
        "flash_sweep_latency_fp32", "flash_sweep_latency_bf16", "flash_sweep_tflops_fp32",
        "flash_sweep_tflops_bf16", "flash_sweep_roofline_fp32", "flash_sweep_roofline_bf16",
        "attention_shapes_tflops", "attention_shapes_against", "attention_shapes_roofline",
        "attention_harness_against", "attention_host_bound_time", "attention_fp32_time",
        "hopper_ladder_tflops",
    ]  # fmt: skip


def test_nothing_overlaps(gallery: Gallery) -> None:
    for name, canvas in gallery.canvases.items():
        boxes = boxes_of(canvas)
        assert len(boxes) >= 3, name
        for i, (what, box) in enumerate(boxes):
            assert not any(box.overlaps(other) for _, other in boxes[i + 1 :]), (name, what)
        for axes in (axes for line in canvas.axes for axes in line):
            shown = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert not any(a.overlaps(b) for a, b in pairwise(shown)), name


def _words(gallery: Gallery, name: str) -> str:
    return " ".join(text.get_text() for text in gallery.canvases[name].figure.texts)


def test_sweep_has_a_panel_for_each_pass_and_head_dim_and_says_what_it_hides(
    gallery: Gallery,
) -> None:
    for what in ("latency", "tflops", "roofline"):
        canvas = gallery.canvases[f"flash_sweep_{what}_bf16"]
        titles = [[axes.get_title(loc="left") for axes in line] for line in canvas.axes]
        assert titles == [
            [f"{which}, d {d}" for d in (16, 32, 64, 128)]
            for which in ("forward", "backward", "forward + backward")
        ]
        words = _words(gallery, f"flash_sweep_{what}_bf16")
        assert "bf16 on NVIDIA H200" in words
        assert "vectorized_torch only in the table" in words
        assert "no time at all: flash_attn_4" in words
    words = _words(gallery, "flash_sweep_latency_fp32")
    assert "no time at all: flash_attn_4; sdpa_cudnn; sdpa_flash" in words


def test_sweep_is_log_log_and_its_throughput_starts_at_zero(gallery: Gallery) -> None:
    scales = {}
    for what in ("latency", "tflops", "roofline"):
        axes = gallery.canvases[f"flash_sweep_{what}_bf16"].axes[0][0]
        scales[what] = (axes.get_xscale(), axes.get_yscale(), axes.get_ylim()[0] == 0)
    assert scales == {
        "latency": ("log", "log", False),
        "tflops": ("log", "linear", True),
        "roofline": ("log", "log", False),
    }


def test_every_ratio_is_a_numbered_bar_against_a_line_at_one(gallery: Gallery) -> None:
    section = gallery.sections[1]
    timed = [row for row in section.rows if row["status"] == "ok"]
    by_case = {(row["shape"], row["pass"], row["attention"]): row["median_ms"] for row in timed}
    expected = sorted(
        time / by_case[shape, which, "flash_attention_triton"]
        for (shape, which, attention), time in by_case.items()
        if attention != "flash_attention_triton"
    )
    panels = [line[0] for line in gallery.canvases["attention_shapes_against"].axes]
    bars = [bar for axes in panels for group in axes.containers for bar in group.patches]
    heights = sorted(bar.get_height() for bar in bars)
    assert heights == pytest.approx(expected)
    assert len(heights) == 9 * 4 * 2 - 2  # Nine shapes, four peers, two passes; flex ran out twice.
    numbers = [text.get_text() for axes in panels for text in axes.texts]
    assert sorted(float(text) for text in numbers if text != "skipped") == pytest.approx(
        expected, abs=0.005
    )
    assert numbers.count("skipped") == 2
    for axes in panels:
        (line,) = axes.lines
        assert list(line.get_ydata()) == [1.0, 1.0]
    words = _words(gallery, "attention_shapes_against")
    assert "ours flash_attention_triton" in words
    assert "batch" not in words


def test_ratios_follow_the_time_that_the_study_is_compared_by(gallery: Gallery) -> None:
    harness = gallery.sections[2]
    (row,) = cells(harness, "flash_attention_triton beside the others")
    times = {row["attention"]: row["metrics.do_bench_ms"] for row in harness.rows}
    assert float(row["ours, do_bench (ms)"]) == pytest.approx(
        times["flash_attention_triton"], rel=1e-3
    )
    assert float(row["flex / ours (x)"]) == pytest.approx(
        times["flex"] / times["flash_attention_triton"], rel=1e-3
    )
    flops = ff.work((1, 16, 16384, 64, True), "bf16", "forward_backward")["flops"]
    rate = flops / times["flash_attention_triton"] / 1e9
    assert float(row["ours, model TFLOP/s"]) == pytest.approx(rate, rel=1e-3)


def test_table_of_shapes_names_times_ratios_and_outcomes(gallery: Gallery) -> None:
    rows = cells(gallery.sections[1], "flash_attention_triton beside the others")
    assert len(rows) == 18
    assert list(rows[0])[:4] == ["shape", "pass", "ours, ms", "ours, model TFLOP/s"]
    assert list(rows[0])[4:] == [
        head
        for other in ("flash_attn_4", *OTHERS)
        for head in (f"{other}, ms", f"{other} / ours (x)")
    ]
    for row in rows:
        ratio = float(row["sdpa, ms"]) / float(row["ours, ms"])
        assert float(row["sdpa / ours (x)"]) == pytest.approx(ratio, rel=2e-3)
        assert (row["flash_attn_4, ms"], row["flash_attn_4 / ours (x)"]) == ("not installed", "-")
    stopped = [row for row in rows if row["shape"] == "B1 H32 S32768 D128 causal"]
    assert [(row["flex, ms"], row["flex / ours (x)"]) for row in stopped] == [("skipped", "-")] * 2


def test_saved_bytes_are_a_table_of_backward_alone(gallery: Gallery) -> None:
    rows = cells(gallery.sections[1], "Saved for backward (GiB)")
    assert len(rows) == 9
    kept = 5 * 16 * 16384 * 64 * 2 / 2**30
    assert rows[0]["shape"] == "B1 H16 S16384 D64 causal"
    assert float(rows[0]["sdpa"]) == pytest.approx(kept, rel=1e-3)
    assert rows[0]["flash_attn_4"] == "not installed"


def test_errors_are_a_row_for_each_shape_and_dtype(gallery: Gallery) -> None:
    section = gallery.sections[5]
    titles = [table.title for table in section.tables]
    assert titles == [
        f"{how} error of {name}" for how in ("Max", "Rms") for name in ("O", "dQ", "dK", "dV")
    ] + ["All cases"]
    rows = cells(section, "Max error of dK")
    assert [(row["shape"], row["dtype"]) for row in rows] == [
        (f"B2 H4 S1024 D{d} {mask}", dtype)
        for d in (64, 128)
        for mask in ("causal", "full")
        for dtype in ("fp32", "fp16", "bf16")
    ]
    assert float(rows[1]["flash_attention_triton"]) == pytest.approx(3 * 9.8e-4, rel=1e-3)
    assert rows[0]["sdpa_flash"] == "skipped"


def test_roofline_points_lie_under_the_roof_that_is_drawn(gallery: Gallery) -> None:
    canvas = gallery.canvases["flash_sweep_roofline_bf16"]
    for axes in (axes for line in canvas.axes for axes in line):
        roof, *series = axes.lines
        assert to_hex(roof.get_color()) == "#555555"
        bends = list(zip(roof.get_xdata(), roof.get_ydata(), strict=True))
        assert [height for _, height in bends[1:]] == [989.0, 989.0]
        assert bends[1][0] == pytest.approx(989 / 4.8)
        assert bends[0][1] == pytest.approx(bends[0][0] * 4.8)
        points = [point for line in series for point in line.get_xydata()]
        assert len(points) > 50
        assert all(tflops < Roof(989, 4.8).at(intensity) for intensity, tflops in points)
        assert [text.get_text() for text in axes.texts] == ["989 TFLOP/s, 4.8 TB/s"]


def test_roofline_joins_a_sweep_and_not_shapes(gallery: Gallery) -> None:
    styles = {}
    for name in ("flash_sweep_roofline_bf16", "attention_shapes_roofline"):
        _, *series = gallery.canvases[name].axes[0][0].lines
        styles[name] = {line.get_linestyle() for line in series}
    assert styles == {"flash_sweep_roofline_bf16": {"-"}, "attention_shapes_roofline": {"None"}}


@given(st.floats(1, 1e4), st.floats(0.1, 10), st.floats(1e-3, 1e6))
def test_roof_is_the_lower_of_its_two_limits(rate: float, bandwidth: float, at: float) -> None:
    roof = Roof(rate, bandwidth)
    assert roof.at(at) == min(rate, at * bandwidth)
    assert roof.at(roof.ridge) == pytest.approx(rate)
    assert (roof.at(at) == rate) or at < roof.ridge


def test_device_of_unknown_peak_has_no_roofline(tmp_path: Path) -> None:
    data = fx.document(*ff.sweep(("fp32",)), *ff.shapes(), device=fx.CPU)
    found = draw(tmp_path, data)
    assert [name for name in found.names if "roofline" in name] == []
    assert any(name.endswith("latency_fp32") for name in found.names)


def test_without_rows_of_ours_there_is_nothing_to_compare(tmp_path: Path) -> None:
    entries = [
        entry
        for entry in ff.shapes()
        if entry.get("extra_info", entry)["case"]["attention"] != "flash_attention_triton"
    ]
    found = draw(tmp_path, fx.document(*entries))
    assert found.names == ["attention_shapes_tflops", "attention_shapes_roofline"]
    titles = [table.title for table in found.sections[0].tables]
    assert titles == ["Model TFLOP/s", "Saved for backward (GiB)", "All cases"]


def test_two_rows_of_ours_are_each_compared(tmp_path: Path) -> None:
    shape = ff.SHAPES[0]
    times = {"flash_attention_triton": 1e-3, "flash_attention_torch": 8e-3, "sdpa": 2e-3}
    entries = [
        fx.timed("attention_shapes", ff.named(name, shape, "bf16", "forward"), time)
        for name, time in times.items()
    ]
    found = draw(tmp_path, fx.document(*entries))
    ratios = {
        name: cells(found.sections[0], f"{name} beside the others")[0]["sdpa / ours (x)"]
        for name in times
        if name != "sdpa"
    }
    assert ratios == {"flash_attention_triton": "2.000", "flash_attention_torch": "0.2500"}
    panels = [line[0] for line in found.canvases["attention_shapes_against"].axes]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "flash_attention_torch", "flash_attention_triton"
    ]  # fmt: skip


def test_rounds_of_several_calls_are_said(gallery: Gallery) -> None:
    notes = {section.name: section.notes for section in gallery.sections}
    said = "Calls made back to back in a round: 50; times are of one call."
    assert said in notes["attention_host_bound"]
    assert said not in notes["attention_shapes"]


def test_intensity_is_flops_over_least_bytes(tmp_path: Path) -> None:
    (section,) = made(tmp_path, fx.timed("s", {"n": 1}, 1e-3, flops=6e9, least_bytes=2_000_000))
    assert cells(section, "All cases")[0]["intensity (FLOP/byte)"] == "3,000"


@pytest.mark.parametrize(("field", "value"), [("least_bytes", -1), ("calls_per_round", 1.5)])
def test_spoiled_fields_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    path = fx.write(
        tmp_path / "run.json", fx.document(fx.timed("s", {"n": 1}, 1, **{field: value}))
    )
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"extra_info.{field} must be " in capsys.readouterr().err


def rows_of(*combinations: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip("abc", values, strict=True)) for values in combinations]


def test_parameters_that_others_settle_tell_nothing_apart() -> None:
    rows = rows_of(("x", 1, 1), ("y", 2, 1), ("x", 1, 2))
    assert further("abc", "a", rows) == ["c"]
    assert further("abc", "b", rows) == ["c"]
    assert further("abc", "ac", rows) == []
    assert further("abc", "c", rows) == ["a"]


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1), st.sets(st.sampled_from("abc")))
def test_named_and_further_parameters_tell_all_cases_apart(
    combinations: list[tuple[int, ...]], named: set[str]
) -> None:
    rows = rows_of(*combinations)
    telling = [*sorted(named), *further("abc", sorted(named), rows)]
    keys = {tuple(row[param] for param in telling) for row in rows}
    assert len(keys) == len(set(combinations))


def test_numbers_within_words_sort_by_size() -> None:
    names = ["B1 D128", "B1 D64", "B16 D8", "B2 D8"]
    found = sorted(names, key=lambda name: order_key("shape", name))
    assert found == ["B1 D64", "B1 D128", "B2 D8", "B16 D8"]


def test_pictures_of_one_parameter_are_named_by_its_values(tmp_path: Path) -> None:
    found = draw(tmp_path, fx.document(*ff.sweep(("bf16",))))
    assert found.names[0] == "flash_sweep_latency_bf16"
    assert isinstance(found.sections[0], Section)
    plots = found.sections[0].study.plots
    assert plots is not None
    assert all(isinstance(plot, Plot) and plot.per == ("dtype",) for plot in plots)
