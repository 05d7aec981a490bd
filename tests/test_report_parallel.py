"""The studies of several processes in the report."""

from __future__ import annotations

from typing import Any

import pytest
import report_fixtures as fx
from report_drawing import Gallery, boxes_of, draw
from test_report_tables import cells

MEGABYTES = (1, 10, 100, 1000)
RATES = {
    ("gloo", 2): 2e9,
    ("gloo", 4): 1.5e9,
    ("gloo", 6): 1e9,
    ("nccl", 2): 3e11,
    ("nccl", 4): 3.5e11,
}
LATENCY = {"gloo": 3e-4, "nccl": 3e-5}


def all_reduce(backend: str, processes: int, megabytes: int) -> dict[str, Any]:
    """Return a case whose links reach a rate of their own after a start-up time."""
    case = {"backend": backend, "processes": processes, "megabytes": megabytes}
    if (backend, processes) not in RATES:
        reason = f"nccl: needs {processes} CUDA devices, found 4"
        return fx.untimed("all_reduce", case, "skipped", reason=reason)
    sent = 2 * (processes - 1) / processes * megabytes * 1e6
    seconds = LATENCY[backend] + sent / RATES[backend, processes]
    metrics = {
        "bus_gb_per_s": sent / seconds / 1e9,
        "algorithm_gb_per_s": megabytes * 1e-3 / seconds,
    }
    counts = {"message_bytes": megabytes * 10**6, "wire_bytes": round(sent)}
    facts = {"devices": f"{processes} x device"}
    return fx.timed("all_reduce", case, seconds, metrics=metrics, counts=counts, facts=facts)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    entries = [
        all_reduce(backend, processes, megabytes)
        for backend in ("gloo", "nccl")
        for processes in (2, 4, 6)
        for megabytes in MEGABYTES
    ]
    device = {**fx.GPU, "count": 4}
    return draw(tmp_path_factory.mktemp("parallel"), fx.document(*entries, device=device))


def test_one_study_with_two_pictures(gallery: Gallery) -> None:
    (section,) = gallery.sections
    assert section.heading == "All-reduce by message size on 4 x NVIDIA H200"
    assert gallery.names == ["all_reduce_bus_bandwidth", "all_reduce_latency"]


@pytest.mark.parametrize("name", ["all_reduce_bus_bandwidth", "all_reduce_latency"])
def test_a_line_for_each_backend_and_number_of_processes(gallery: Gallery, name: str) -> None:
    canvas = gallery.canvases[name]
    ((axes,),) = canvas.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "message (MB)"
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(MEGABYTES)]
    assert len(lines) == len(RATES)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(RATES)
    (legend,) = canvas.figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [f"{backend}, {processes}" for backend, processes in RATES]
    words = " ".join(text.get_text() for text in canvas.figure.texts)
    assert "no time at all: nccl, 6" in words


def test_lines_are_the_measures(gallery: Gallery) -> None:
    rows = [row for row in gallery.sections[0].rows if row["status"] == "ok"]
    for name, label, column in (
        ("all_reduce_bus_bandwidth", "bus bandwidth (GB/s)", "metrics.bus_gb_per_s"),
        ("all_reduce_latency", "median (ms)", "median_ms"),
    ):
        ((axes,),) = gallery.canvases[name].axes
        assert axes.get_ylabel() == label
        drawn = [height for line in axes.lines for height in line.get_ydata()]
        assert set(drawn) >= {row[column] for row in rows}


def test_nothing_overlaps(gallery: Gallery) -> None:
    for name, canvas in gallery.canvases.items():
        boxes = boxes_of(canvas)
        assert len(boxes) >= 3, name
        for i, (what, box) in enumerate(boxes):
            assert not any(box.overlaps(other) for _, other in boxes[i + 1 :]), (name, what)


def test_tables_have_a_column_for_each_size(gallery: Gallery) -> None:
    (section,) = gallery.sections
    titles = [table.title for table in section.tables]
    assert titles == ["Median ms", "Bus bandwidth in GB/s", "All cases"]
    rows = cells(section, "Bus bandwidth in GB/s")
    assert [(row["backend"], row["processes"]) for row in rows] == [
        (backend, str(processes)) for backend in ("gloo", "nccl") for processes in (2, 4, 6)
    ]
    for row in rows[:5]:
        key = (row["backend"], int(row["processes"]))
        least, most = float(row["message (MB)=1"]), float(row["message (MB)=1000"])
        assert least < most <= RATES[key] / 1e9
    assert {row for column, row in rows[5].items() if "MB" in column} == {"skipped"}
    case = cells(section, "All cases")[len(MEGABYTES) - 1]
    assert case["devices"] == "2 x device"
    assert case["sent by a rank (GiB)"] == "0.9313"
