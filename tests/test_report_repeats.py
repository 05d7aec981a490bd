"""Several runs of one comparison: medians and spreads of ratios, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flash_fixtures as ff
import pytest
import report_fixtures as fx

from cs336_systems.report.__main__ import main

SHAPES = [(1, 16, 16384, 64, True), (8, 16, 2048, 128, False)]


def shown(times: dict[str, float], dtype: str = "bf16") -> list[dict[str, Any]]:
    """Return both shapes' forward passes with a time in ms for each row."""
    return [
        fx.timed("attention_shapes", ff.named(attention, shape, dtype, "forward"), ms / 1e3)
        for shape in SHAPES
        for attention, ms in times.items()
    ]


def written(tmp_path: Path, *runs: list[dict[str, Any]], **how: Any) -> list[str]:
    return [
        str(fx.write(tmp_path / f"run{number}.json", fx.document(*run, **how)))
        for number, run in enumerate(runs)
    ]


def test_median_spread_and_geometric_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": ms}) for ms in (1.5, 1.1, 1.2)]
    assert main(["repeats", *written(tmp_path, *runs)]) == 0
    printed = capsys.readouterr().out
    assert "that of flash_attention_hopper, 3 runs: median [least, most]" in printed
    assert printed.count("1.200 [1.100, 1.500]") == 2
    (last,) = (line for line in printed.splitlines() if "geometric mean" in line)
    assert last.split("|")[-2].strip() == "1.200"


def test_geometric_and_not_arithmetic_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.0})
    run[-1]["stats"] = fx.stats(4e-3)
    assert main(["repeats", *written(tmp_path, run)]) == 0
    (last,) = (x for x in capsys.readouterr().out.splitlines() if "geometric mean" in x)
    assert last.split("|")[-2].strip() == "2.000"


def test_a_case_that_one_run_lacks_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.5, "flex": 3.0})
    short = shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.5})
    assert main(["repeats", *written(tmp_path, whole, short)]) == 0
    assert "flex" not in capsys.readouterr().out


def test_dtypes_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        *shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.5}),
        *shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 2.5}, dtype="fp16"),
    ]
    assert main(["repeats", *written(tmp_path, run)]) == 0
    printed = capsys.readouterr().out
    assert "fp16" in printed
    assert printed.count("2.500 [2.500, 2.500]") == printed.count("1.500 [1.500, 1.500]") == 2


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("scaling", "report: --study must be one of attention_shapes, "),
        ("attention_fp32", "report: attention_fp32: no case was timed beside another in every run"),
    ],
)
def test_a_study_without_ratios_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], study: str, said: str
) -> None:
    files = written(tmp_path, shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.5}))
    assert main(["repeats", *files, "--study", study]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_unlike_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shown({"flash_attention_hopper": 1.0, "sdpa_cudnn": 1.5})
    (one,) = written(tmp_path, run)
    device = {**fx.GPU, "name": "NVIDIA H100 80GB HBM3"}
    other = fx.write(tmp_path / "other.json", fx.document(*run, device=device))
    assert main(["repeats", one, str(other)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("report: repeats refused: device: base NVIDIA H200, head NVIDIA H100")
    assert printed.count("\n") == 1
