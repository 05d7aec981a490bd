"""The experiments' five files, from measurements made by hand with every outcome in them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fx
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from report_drawing import Gallery, draw
from test_report_plots import (
    test_nothing_overlaps_or_leaves_the_picture as check_nothing_overlaps,
)
from test_report_plots import test_tick_labels_do_not_overlap as check_tick_labels

from cs336_systems.errors import UsageError
from cs336_systems.report.experiment import write_experiment
from cs336_systems.report.frame import load

GIB = 2**30
PLAIN = "scaled_dot_prod_attention"
KERNELS = {PLAIN: 1.0, "vectorized_torch": 0.9, "flash_attention_triton": 0.5}
WRAPPERS = {"none": 1.0, "naive": 1.3, "flashddp": 1.05, "torch_ddp": 1.1}
LENGTHS = (128, 256, 512, 1024, 2048)


def lm_run(kernel: str, wrapper: str, **changes: Any) -> dict[str, Any]:
    """Return a short training run: out of memory or not installed for some."""
    ranks = 1 if wrapper == "none" else 2
    case = {
        "strategy": wrapper,
        "size": "L24 H16 D512 F4096 V10000",
        "context": 256,
        "batch": 8,
        "ranks": ranks,
        "precision": "bf16",
        "communication": "fp32",
        "attention": kernel,
    }
    if kernel == "flash_attn_4":
        reason = "flash_attn_4: package flash_attn.cute is not installed"
        return fx.untimed("lm_matrix", case, "not_installed", reason=reason)
    if (kernel, wrapper) == ("vectorized_torch", "naive"):
        reason = "rank 1 ran out of memory allocating 7.50 GiB"
        return fx.untimed("lm_matrix", case, "oom", reason=reason)
    seconds = 0.04 * KERNELS.get(kernel, 1.0) * WRAPPERS[wrapper]
    held = {"parameters": 0.7, "gradients": 0.7, "optimizer_state": 1.4, "communication": 0.1}
    metrics = {f"memory_{kind}_bytes": GIB * size for kind, size in held.items()}
    activations = 4 * GIB * KERNELS.get(kernel, 1.0)
    metrics |= {
        "memory_activations_bytes": activations,
        "memory_bytes": activations + sum(metrics.values()),
        "epoch_s": seconds * 10 / ranks,
        "first_loss": 9.3,
        "last_loss": 7.1,
    }
    common = {
        "tokens": 8 * 256 * ranks,
        "metrics": metrics,
        "baseline": {"attention": PLAIN},
        "facts": {"setting": "Model: 24 layers. Data: random tokens"},
        **changes,
    }
    return fx.timed("lm_matrix", case, seconds, **common)


def lm_matrix() -> list[dict[str, Any]]:
    return [lm_run(kernel, name) for kernel in (*KERNELS, "flash_attn_4") for name in WRAPPERS]


def attention_sweep() -> list[dict[str, Any]]:
    """Return the sweep of three kernels, one of which is skipped where keys are many."""
    return [sweep_case(kernel, q, k) for kernel in KERNELS for q in LENGTHS for k in LENGTHS]


def sweep_case(kernel: str, queries: int, keys: int) -> dict[str, Any]:
    times = max(queries, keys) // min(queries, keys)
    ratio = f"N_q = {times} N_k" if queries > keys else f"N_k = {times} N_q"
    case = {
        "attention": kernel,
        "dtype": "bf16",
        "d": 64,
        "tier": max(queries, keys),
        "queries": queries,
        "keys": keys,
        "ratio": "N_q = N_k" if queries == keys else ratio,
    }
    if kernel == "vectorized_torch" and keys == 2048:
        return fx.untimed("attention_sweep", case, "oom", reason="asked for 16.0 GiB")
    seconds = 1e-5 + KERNELS[kernel] ** 3 * queries * keys * 4e-11
    more = {"clock": "gpu_ms", "cache": "cold", "baseline": {"attention": PLAIN}}
    return fx.timed("attention_sweep", case, seconds, **more)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    device = {**fx.GPU, "count": 2}
    data = fx.document(*lm_matrix(), *attention_sweep(), device=device)
    return draw(tmp_path_factory.mktemp("experiments"), data)


def panels(gallery: Gallery, name: str) -> list[Axes]:
    return [axes for line in gallery.canvases[name].axes for axes in line]


def test_pictures_are_those_of_the_commands(gallery: Gallery) -> None:
    assert gallery.names == [
        "lm_matrix_time", "lm_matrix_memory", "lm_matrix_throughput",
        "attention_sweep_forward", "attention_sweep_heatmap", "attention_sweep_scaling",
    ]  # fmt: skip


def test_nothing_overlaps(gallery: Gallery) -> None:
    check_nothing_overlaps(gallery)
    check_tick_labels(gallery)


def test_runs_are_grouped_by_kernel_and_named_in_whole_words(gallery: Gallery) -> None:
    (axes,) = panels(gallery, "lm_matrix_time")
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [
        "flash_\nattention_\ntriton", "flash_attn_4", "scaled_dot_\nprod_\nattention",
        "vectorized_\ntorch",
    ]  # fmt: skip
    assert axes.get_ylabel() == "wall time per epoch (s)"
    marks = sorted(text.get_text() for text in axes.texts)
    assert marks == ["OOM", *["not installed"] * 4]
    bars = [patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert max(bars) == pytest.approx(0.4)


def test_memory_has_a_panel_for_each_kernel(gallery: Gallery) -> None:
    axes = panels(gallery, "lm_matrix_memory")
    assert len(axes) == 4
    assert axes[0].get_ylabel() == "memory (GiB)"
    heights = [patch.get_height() for patch in axes[2].patches]
    assert sum(heights) == pytest.approx(4 * (4 + 2.9))


def test_a_heat_map_compares_every_pair_with_the_plain_kernel(gallery: Gallery) -> None:
    axes = panels(gallery, "attention_sweep_heatmap")
    titles = [each.get_title(loc="left") for each in axes]
    assert titles == ["flash_attention_triton", "vectorized_torch"]
    assert all(len(each.texts) == 25 for each in axes)
    numbers = {text.get_position(): text.get_text() for text in axes[0].texts}
    expected = (1e-5 + 2048**2 * 4e-11) / (1e-5 + 2048**2 * 5e-12)
    assert float(numbers[4, 4]) == pytest.approx(expected, rel=5e-3)
    assert [text.get_text() for text in axes[1].texts].count("OOM") == 5
    assert [axes[0].get_xlabel(), axes[0].get_ylabel()] == [
        "keys N_k (tokens)",
        "queries N_q (tokens)",
    ]


def test_growth_is_drawn_beside_slopes(gallery: Gallery) -> None:
    axes = panels(gallery, "attention_sweep_scaling")
    assert [each.get_title(loc="left") for each in axes] == [
        "N_q = N_k",
        "N_q = 2 N_k",
        "N_k = 2 N_q",
    ]
    guides = [line for line in axes[0].lines if line.get_color() == "#777777"]
    for line, power in zip(guides, (1, 2), strict=True):
        first, last = line.get_ydata()[0], line.get_ydata()[-1]  # type: ignore[index]
        assert last / first == pytest.approx((2048 / 128) ** power)
    (legend,) = gallery.canvases["attention_sweep_scaling"].figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words[-2:] == ["slope of N", "slope of N²"]


def test_wrappers_are_compared_by_tokens_and_kernels_by_time(tmp_path: Path) -> None:
    frame = load([fx.write(tmp_path / "run.json", fx.document(*lm_matrix()))])
    rows = {(row["attention"], row["strategy"]): row for row in frame.rows()}
    naive = rows[PLAIN, "naive"]
    assert naive["metrics.over_alone"] == pytest.approx(2 / 1.3)
    assert naive["speedup"] == pytest.approx(1.0)
    flash = rows["flash_attention_triton", "flashddp"]
    assert flash["metrics.over_alone"] == pytest.approx(2 / 1.05)
    assert flash["speedup"] == pytest.approx(2.0)
    assert rows[PLAIN, "none"]["metrics.over_alone"] == 1.0
    assert rows["vectorized_torch", "naive"]["metrics.over_alone"] is None


def test_without_none_nothing_is_held_against_it(tmp_path: Path) -> None:
    data = fx.document(lm_run(PLAIN, "naive"), lm_run(PLAIN, "flashddp"))
    write_experiment([fx.write(tmp_path / "run.json", data)], "lm_matrix", tmp_path)
    report = (tmp_path / "lm_matrix_report.md").read_text()
    assert "over those of none" not in report
    assert "DDP speed-up: wall time per epoch in s" in report


def test_five_files_tell_all_outcomes(tmp_path: Path) -> None:
    source = fx.write(tmp_path / "run.json", fx.document(*lm_matrix()))
    written = write_experiment([source], "lm_matrix", tmp_path / "out")
    assert sorted(path.name for path in written) == [
        "lm_matrix_memory.png", "lm_matrix_report.md", "lm_matrix_results.csv",
        "lm_matrix_throughput.png", "lm_matrix_time.png",
    ]  # fmt: skip
    with (tmp_path / "out" / "lm_matrix_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["status"] for row in rows} == {"ok", "oom", "not_installed"}
    report = (tmp_path / "out" / "lm_matrix_report.md").read_text()
    for part in (
        "(lm_matrix_time.png)",
        "OOM: rank 1 ran out of memory allocating 7.50 GiB",
        "not installed: flash_attn_4: package",
        "Model: 24 layers. Data: random tokens.",
        "Measured on: NVIDIA H200; power limit 700 W; driver 580.159.04; CUDA 13.0;",
        "commit 0123abcd",
        "| wall time per epoch (s) |".strip("| "),
    ):
        assert part in report, part


@pytest.mark.parametrize("study", ["lm_matrix", "attention_sweep"])
def test_files_are_there_when_nothing_has_a_time(tmp_path: Path, study: str) -> None:
    entry = lm_run("flash_attn_4", "none")
    if study == "attention_sweep":
        entry = sweep_case("vectorized_torch", 128, 2048)
    source = fx.write(tmp_path / "run.json", fx.document(entry))
    written = write_experiment([source], study, tmp_path)
    assert len(written) == 5
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 150
    (report,) = (path.read_text() for path in written if path.suffix == ".md")
    assert entry["reason"] in report


def test_one_kernel_is_compared_with_itself(tmp_path: Path) -> None:
    gallery = draw(tmp_path, fx.document(sweep_case(PLAIN, 256, 128)))
    assert gallery.names == [
        "attention_sweep_forward",
        "attention_sweep_heatmap",
        "attention_sweep_scaling",
    ]
    (axes,) = panels(gallery, "attention_sweep_heatmap")
    assert [text.get_text() for text in axes.texts] == ["1.00"]


def test_a_file_without_the_study_is_refused(tmp_path: Path) -> None:
    source = fx.write(tmp_path / "run.json", fx.document(lm_run(PLAIN, "none")))
    with pytest.raises(UsageError, match="attention_sweep must be measured on one kind"):
        write_experiment([source], "attention_sweep", tmp_path)
