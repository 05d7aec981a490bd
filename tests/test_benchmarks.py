"""The benchmark suite itself: choices on the command line, one-line errors, rows of every kind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_train_loop import sweep as sweep_train_loop
from warm_pytest import run_pytest


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `pytest benchmarks/` on the CPU."""
    return run_pytest(
        "benchmarks/", "-p", "no:xdist", "-p", "no:cacheprovider", "--device=cpu", *args
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes=huge"], "benchmarks: --sizes must be one of debug, tiny, small"),
        (
            ["--precisions=fp8"],
            "benchmarks: --precisions must be one of fp32, tf32, bf16, got 'fp8'",
        ),
        (
            ["--attention=flash9"],
            "benchmarks: --attention must be one of scaled_dot_prod_attention",
        ),
        (["--contexts=0"], "benchmarks: --contexts must list integers of at least 1, got '0'"),
        (["--contexts=,"], "benchmarks: --contexts must list at least one value, got ','"),
    ],
)
def test_wrong_choices_are_one_line(options: list[str], message: str) -> None:
    result = run(*options)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def selected(*args: str) -> list[str]:
    """Return the collected test ids."""
    result = run("--collect-only", "-q", *args)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_choices_select_cases() -> None:
    cases = selected(
        "--sizes=debug,tiny", "--contexts=16", "--precisions=bf16", "--compile-modes=eager",
        "--passes=forward", "-k", "model_pass",
    )  # fmt: skip
    assert [case.split("[")[1] for case in cases] == [
        "debug-16-bf16-eager-forward]",
        "tiny-16-bf16-eager-forward]",
    ]


def test_gate_selects_timed_and_counted_cases_only() -> None:
    cases = selected("--gate")
    assert {case.split("::")[1].split("[")[0] for case in cases} == {
        "bench_model_pass",
        "bench_attention_grid",
    }


def test_the_loop_is_timed_on_a_size_that_has_room_for_a_tokenizer() -> None:
    cases = selected("--sizes=debug", "--contexts=16", "--precisions=fp32", "-k", "train_loop")
    assert [case.split("[")[1] for case in cases] == [
        "tiny-16-fp32-bare step]",
        "tiny-16-fp32-loop]",
    ]


@pytest.mark.parametrize(
    ("sizes", "contexts", "points"),
    [
        (("small", "medium", "large"), (128, 1024), [("small", 128), ("medium", 1024)]),
        (("small",), (128, 512), [("small", 128), ("small", 512)]),
        (("debug",), (16,), [("tiny", 16)]),
    ],
)
def test_on_a_gpu_the_loop_is_also_timed_where_the_device_decides(
    sizes: tuple[str, ...], contexts: tuple[int, ...], points: list[tuple[str, int]]
) -> None:
    chosen: Any = SimpleNamespace(
        device=torch.device("cuda"),
        sizes=sizes,
        contexts=contexts,
        precisions=("bf16",),
        gate=False,
    )
    _, cases = sweep_train_loop(chosen)
    assert list(dict.fromkeys((size, context) for size, context, *_ in cases)) == points
    assert {how for *_, how in cases} == {"bare step", "loop"}


def test_rows_of_every_kind(tmp_path: Path) -> None:
    """A size that cannot fit, a row that is not installed, a pass that is measured, in one run."""
    output = tmp_path / "out.json"
    result = run(
        "--sizes=debug,8b", "--contexts=16", "--passes=optimizer", "--precisions=fp32",
        "--compile-modes=eager", "--rows=flash_attn_4,sdpa", "--seqs=16", "--head-dims=8",
        "--rounds=1", "--warmup-rounds=0", f"--benchmark-json={output}",
        "-k", "model_pass or attention_grid",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(output.read_text())
    rows = {(row["study"], row["case"].get("size", row["case"].get("attention"))): row
            for row in data["cs336_systems"]["rows"]}  # fmt: skip
    too_large = rows["model_pass", "8b"]
    assert too_large["status"] == "oom"
    assert too_large["reason"].startswith("predicted: needs at least ")
    assert rows["attention_grid", "flash_attn_4"]["status"] in ("not_installed", "skipped")
    timed = {entry["extra_info"]["study"]: entry["extra_info"] for entry in data["benchmarks"]}
    assert set(timed) == {"attention_grid", "model_pass"}
    assert timed["model_pass"]["case"]["size"] == "debug"
