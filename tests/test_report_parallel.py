"""The studies of several processes in the report."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fx
from matplotlib.axes import Axes
from report_drawing import Gallery, boxes_of, draw
from test_report_tables import cells

from cs336_systems.errors import UsageError
from cs336_systems.parallel import STRATEGIES
from cs336_systems.report.frame import load

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


# --- training steps ---

GIB = 2**30
KINDS = ("parameters", "gradients", "optimizer_state", "communication", "activations")
STEP_MS = {name: 100.0 + 5 * place for place, name in enumerate(STRATEGIES)}
SHARDED = ("fsdp", "torch_fsdp2")


def training(strategy: str, ranks: int, **changes: Any) -> dict[str, Any]:
    """Return a step that is slower on more ranks, and the memory of its parts."""
    case = {
        "strategy": strategy,
        "size": "xl",
        "context": 512,
        "batch": 2,
        "ranks": ranks,
        "precision": "bf16",
        "communication": "fp32",
    }
    if strategy == "flat" and ranks == 4:
        reason = "rank 1 ran out of memory allocating 7.50 GiB"
        return fx.untimed("data_parallel", case, "oom", reason=reason)
    share = ranks if strategy in SHARDED else 1
    parts = {"init": (8, 0, 0), "before_step": (8, 8, 0), "after_step": (8, 8, 16)}
    metrics: dict[str, Any] = {"predicted_held_bytes": 32 * GIB / share, "communication_ms": 20.0}
    for phase, sizes in parts.items():
        held = (*(size / share for size in sizes), 0.5, 10.0)
        metrics |= {f"{phase}_{kind}_bytes": GIB * n for kind, n in zip(KINDS, held, strict=True)}
        metrics[f"{phase}_peak_bytes"] = GIB * sum(held)
    if strategy in SHARDED:
        metrics["gather_wait_ms"] = 3.0
    quiet = strategy == "none"
    timeline = {"0 compute": "0:50 70:90", "0 communication": "" if quiet else "50:70 80:85"}
    timeline |= {"1 compute": "0:95", "1 communication": ""}
    common = {"tokens": 1024 * ranks, "metrics": metrics, "timeline": timeline, **changes}
    return fx.timed("data_parallel", case, STEP_MS[strategy] * ranks / 2e3, **common)


def bucket(strategy: str, megabytes: int | None) -> dict[str, Any]:
    """Return a step with buckets of a size, or one without communication."""
    case = {"strategy": strategy, "size": "xl", "ranks": 2}
    if megabytes is None:
        return fx.timed("data_parallel_buckets", case, 0.1)
    case["bucket_mb"] = megabytes
    metrics = {"predicted_exposed_ms": 4.0 + megabytes / 100, "best_bucket_mb": 30.0}
    seconds = 0.1 + megabytes * 1e-5 + (0.002 if strategy == "torch_ddp" else 0.0)
    return fx.timed("data_parallel_buckets", case, seconds, metrics=metrics, spread=0.0)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    entries = [training(strategy, ranks) for strategy in STRATEGIES for ranks in (2, 4)]
    entries.append(bucket("none", None))
    entries += [bucket(name, size) for name in ("flashddp", "torch_ddp") for size in MEGABYTES]
    device = {**fx.GPU, "count": 4}
    return draw(tmp_path_factory.mktemp("steps"), fx.document(*entries, device=device))


def only_panel(gallery: Gallery, name: str) -> Axes:
    ((axes,),) = gallery.canvases[name].axes
    return axes


def test_steps_and_buckets_have_their_pictures(steps: Gallery) -> None:
    assert [section.name for section in steps.sections] == [
        "data_parallel",
        "data_parallel_buckets",
    ]
    assert steps.names == [
        "data_parallel_step_time",
        "data_parallel_memory_init",
        "data_parallel_memory_before_step",
        "data_parallel_memory_after_step",
        "data_parallel_timeline",
        "data_parallel_scaling",
        "data_parallel_buckets_added",
    ]


def test_what_communication_costs_is_held_against_none_and_torch(steps: Gallery) -> None:
    rows = {
        (row["strategy"], row["ranks"]): row
        for row in steps.sections[0].rows
        if row["status"] == "ok"
    }
    for (strategy, ranks), row in rows.items():
        alone = rows["none", ranks]["median_ms"]
        if strategy == "none":
            assert row["metrics.exposed_ms"] is None
            continue
        assert row["metrics.exposed_ms"] == pytest.approx(row["median_ms"] - alone)
        assert row["metrics.over_none"] == pytest.approx(row["median_ms"] / alone)
    for own, peer in (("flashddp", "torch_ddp"), ("zero1", "torch_zero"), ("fsdp", "torch_fsdp2")):
        ratio = rows[own, 4]["metrics.over_peer"]
        assert ratio == pytest.approx(STEP_MS[own] / STEP_MS[peer])
        assert rows[peer, 4]["metrics.over_peer"] is None


def test_steps_are_listed_with_what_they_cost(steps: Gallery) -> None:
    (section, buckets) = steps.sections
    titles = [table.title for table in section.tables]
    assert titles == [
        "Steps",
        "Memory after the model and optimizer are built",
        "Memory before the first optimizer step",
        "Memory after the first optimizer step",
        "Median ms by ranks",
        "Tokens/s of all ranks",
        "All cases",
    ]
    listed = cells(section, "Steps")
    assert [row["strategy"] for row in listed[::2]] == list(STRATEGIES)
    flat = next(row for row in listed if (row["strategy"], row["ranks"]) == ("flat", "4"))
    assert flat["median (ms)"] == "OOM"
    fsdp = next(row for row in listed if row["strategy"] == "fsdp")
    assert fsdp["waiting for gathers (ms)"] == "3.000"
    memory = cells(section, "Memory after the first optimizer step")
    ddp = next(row for row in memory if row["strategy"] == "torch_ddp")
    assert ddp["optimizer state (GiB)"] == "16.00"
    assert ddp["held after the step, predicted (GiB)"] == "32.00"
    assert [table.title for table in buckets.tables] == ["Bucket sizes", "All cases"]
    scaling = cells(section, "Tokens/s of all ranks")
    assert {"ranks=2", "ranks=4"} < set(scaling[0])


def test_stacks_are_parts_of_the_peak(steps: Gallery) -> None:
    canvas = steps.canvases["data_parallel_memory_after_step"]
    (two,), (four,) = canvas.axes
    assert len(two.patches) == len(KINDS) * len(STRATEGIES)
    tops = {round(bar.get_y() + bar.get_height(), 6) for bar in two.patches}
    assert max(tops) == pytest.approx(8 + 8 + 16 + 0.5 + 10)
    assert {line.get_ydata()[0] for line in two.lines} == {32.0, 16.0}
    assert {line.get_ydata()[0] for line in four.lines} == {32.0, 8.0}
    assert "OOM" in [text.get_text() for text in four.texts]
    (legend,) = canvas.figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[-3:] == ["gradients", "parameters", "predicted"]
    boxes = [label.get_window_extent() for label in four.get_xticklabels()]
    assert not any(box.overlaps(after) for box, after in pairwise(boxes))
    assert len({tuple(bar.get_facecolor()) for bar in two.patches}) == len(KINDS)


def test_lanes_of_rank_0_are_drawn(steps: Gallery) -> None:
    canvas = steps.canvases["data_parallel_timeline"]
    (two,), (four,) = canvas.axes
    assert [label.get_text() for label in two.get_yticklabels()] == list(STRATEGIES)
    assert (two.get_title(loc="left"), four.get_title(loc="left")) == ("ranks 2", "ranks 4")
    for position, (compute, communication) in enumerate(
        zip(two.collections[::2], two.collections[1::2], strict=True)
    ):
        (first, second) = (path.get_extents() for path in compute.get_paths())
        assert (first.x0, first.x1, second.x0, second.x1) == (0, 50, 70, 90)
        assert first.y1 <= position <= first.y1 + 0.1
        strategy = list(STRATEGIES)[position]
        assert len(communication.get_paths()) == (0 if strategy == "none" else 2)


def test_buckets_are_drawn_beside_their_model(steps: Gallery) -> None:
    axes = only_panel(steps, "data_parallel_buckets_added")
    drawn = {tuple(line.get_ydata()) for line in axes.lines}
    assert tuple(4.0 + size / 100 for size in MEGABYTES) in drawn
    assert len(axes.lines) == 4
    flashddp = next(line for line in axes.lines if len(line.get_ydata()) == len(MEGABYTES))
    assert flashddp.get_ydata() == pytest.approx([size * 1e-2 for size in MEGABYTES])
    (legend,) = steps.canvases["data_parallel_buckets_added"].figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["flashddp", "torch_ddp", "predicted"]


def test_nothing_overlaps_in_pictures_of_steps(steps: Gallery) -> None:
    test_nothing_overlaps(steps)


@pytest.mark.parametrize("lane", [3, ["0:1"], "0", "0:x", "2:1", "0:2 1:3", "0:inf", "0:nan"])
def test_a_lane_that_is_none_is_refused(tmp_path: Path, lane: Any) -> None:
    entry = training("naive", 2, timeline={"0 compute": lane})
    with pytest.raises(UsageError, match=r"timeline\.0 compute must be begins and ends in order"):
        load([fx.write(tmp_path / "run.json", fx.document(entry))])


# --- scaling ---


def scaled(scaling: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Return a step of ranks that lose a tenth of their time where they communicate."""
    batch = 24 if scaling == "weak" else 24 // ranks
    case = {"scaling": scaling, "strategy": strategy, "size": "xl", "batch": batch, "ranks": ranks}
    alone = batch * 0.02
    seconds = alone if strategy == "none" else alone / 0.9
    sent_ms = {2: 100.0, 4: 300.0}
    metrics = {} if ranks == 1 else {"predicted_communication_ms": sent_ms[ranks]}
    return fx.timed("scaling", case, seconds, tokens=512 * batch * ranks, metrics=metrics)


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    entries = [scaled(kind, "none", 1) for kind in ("weak", "strong")]
    entries += [
        scaled(kind, strategy, ranks)
        for kind in ("weak", "strong")
        for ranks in (2, 4)
        for strategy in ("none", "flashddp")
    ]
    device = {**fx.GPU, "count": 4}
    return draw(tmp_path_factory.mktemp("scaling"), fx.document(*entries, device=device))


def test_scaling_is_held_against_one_rank_alone(scaling: Gallery) -> None:
    rows = {
        (row["scaling"], row["strategy"], row["ranks"]): row for row in scaling.sections[0].rows
    }
    for kind in ("weak", "strong"):
        for ranks in (2, 4):
            ddp = rows[kind, "flashddp", ranks]
            assert ddp["metrics.speedup"] == pytest.approx(0.9 * ranks)
            assert ddp["metrics.efficiency"] == pytest.approx(0.9)
            assert rows[kind, "none", ranks]["metrics.efficiency"] == pytest.approx(1.0)
    # As long as computing, or as sending where that is longer.
    assert rows["weak", "flashddp", 2]["metrics.predicted_ms"] == pytest.approx(480.0)
    assert rows["strong", "flashddp", 4]["metrics.predicted_ms"] == pytest.approx(300.0)
    assert rows["weak", "none", 1].get("metrics.predicted_ms") is None


def test_scaling_has_a_panel_for_each_kind(scaling: Gallery) -> None:
    assert scaling.names == ["scaling_efficiency", "scaling_tokens"]
    panels = [axes for (axes,) in scaling.canvases["scaling_efficiency"].axes]
    assert [axes.get_title(loc="left") for axes in panels] == ["weak", "strong"]
    drawn = {tuple(line.get_ydata()) for axes in panels for line in axes.lines}
    assert any(values == pytest.approx((0.9, 0.9)) for values in drawn if len(values) == 2)
    test_nothing_overlaps(scaling)
