"""The benchmarks of fused attention: their rows, their choices, and the check before each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_bench import CHECKED_ROWS, AttentionBench, Shape, last_rows
from bench_flash_harness import APPLIED, harness_check, harness_function, harness_step
from flash_cases import OURS, Point, cpu_grids, gpu_grids
from hypothesis import example, given
from hypothesis import strategies as st
from pace import Pace, run_once
from test_benchmarks import run, selected

from cs336_systems.attention import ATTENTION
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.errors import UsageError
from cs336_systems.measure.workload import NotMeasured, Workload

CPU = torch.device("cpu")
ERRORS = {f"{name}_{how}_error" for name in ("o", "dq", "dk", "dv") for how in ("max", "rms")}
STUDIES = {
    "flash_sweep", "attention_shapes", "attention_harness", "attention_host_bound",
    "attention_fp32", "attention_error",
}  # fmt: skip


def test_smoke_measures_every_study(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    wanted = " or ".join(sorted(STUDIES))
    result = run("--smoke", "--rounds=1", f"--benchmark-json={output}", "-k", wanted)
    assert result.returncode == 0, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(output.read_text())
    timed = [
        entry["extra_info"]
        for entry in data["benchmarks"]
        if entry["extra_info"]["case"].get("attention") == "sdpa"
    ]
    found = {(row["study"], row["case"]["pass"]): row for row in timed}
    assert {study for study, _ in found} == STUDIES
    assert found["attention_shapes", "backward"]["counts"]["saved_bytes"] >= 4 * 2 * 64 * 16 * 4
    assert set(found["attention_error", "forward"]["metrics"]) >= ERRORS
    assert found["attention_host_bound", "forward"]["calls_per_round"] == 50
    assert found["attention_harness", "forward_backward"]["case"]["compile"] == "eager"
    assert found["flash_sweep", "forward"]["least_bytes"] == 4 * 64 * 16 * 4
    assert "shape" not in found["flash_sweep", "forward"]["case"]


def test_the_interpreter_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    output = tmp_path / "out.json"
    result = run("--smoke", f"--benchmark-json={output}", "-k", "flash_sweep and triton")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(output.read_text())["cs336_systems"]["rows"]
    reason = "flash_attention_triton: not timed in Triton's interpreter"
    assert {row["reason"] for row in rows} == {reason}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shapes=B1 H2", "--shapes must list names like B1 H16 S16384 D64 causal, got 'B1 H2'"),
        ("--shapes=B1 H0 S8 D8 full", "--shapes must list names like"),
        ("--harness-rep-ms=0", "benchmarks: --harness-rep-ms must be at least 1, got 0"),
        ("--rows=flash9", "benchmarks: --rows must be one of scaled_dot_prod_attention"),
    ],
)
def test_wrong_choices_are_one_line(option: str, message: str) -> None:
    result = run(option)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_choices_select_cases() -> None:
    cases = selected(
        "--rows=sdpa", "--seqs=64,32", "--head-dims=8", "--dtypes=bf16", "--passes=forward",
        "--shapes=B1 H2 S16 D8 full", "-k", "flash_sweep or attention_shapes or attention_harness",
    )  # fmt: skip
    assert [case.split("::")[1] for case in cases] == [
        "bench_flash_sweep[sdpa-bf16-B1-H1-S32-D8-causal-forward]",
        "bench_flash_sweep[sdpa-bf16-B1-H1-S64-D8-causal-forward]",
        "bench_attention_shapes[sdpa-bf16-B1-H2-S16-D8-full-forward]",
        "bench_attention_harness[sdpa-fp32-B1-H2-S256-D32-causal-forward_backward]",
    ]


def test_gpu_sweep_is_the_courses_over_the_whole_table() -> None:
    sweep = gpu_grids()["flash_sweep"]
    assert sweep.rows == tuple(ATTENTION)
    assert sweep.dtypes == ("bf16", "fp32")
    assert sorted({shape.seq for shape in sweep.shapes}) == [2**power for power in range(7, 17)]
    assert sorted({shape.d for shape in sweep.shapes}) == [16, 32, 64, 128]
    assert len(sweep.shapes) == 40
    assert {(shape.batch, shape.heads, shape.causal) for shape in sweep.shapes} == {(1, 1, True)}


def test_gpu_harness_is_the_public_one_for_every_fused_row() -> None:
    grid = gpu_grids()["attention_harness"]
    assert [str(shape) for shape in grid.shapes] == ["B1 H16 S16384 D64 causal"]
    assert grid.dtypes == ("bf16",)
    peers = {row for row in ATTENTION if ATTENTION[row].peer}
    assert set(grid.rows) - peers == {f"{OURS}triton", f"{OURS}hopper"}
    assert peers <= set(grid.rows)


def test_nothing_compiles_in_a_cpus_default_run() -> None:
    rows = {row for grid in cpu_grids().values() for row in grid.rows}
    assert not any("compiler" in ATTENTION[row].needs for row in rows)
    assert {"scaled_dot_prod_attention", "sdpa"} <= rows


sizes = st.integers(1, 10**6)


@given(st.builds(Shape, sizes, sizes, sizes, sizes, st.booleans()))
def test_shape_is_its_name(shape: Shape) -> None:
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("name", ["", "B1 H1 S8 D8", "b1 h1 s8 d8 full", "B1 H1 S8 D8 full x"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--shapes must list names like"):
        Shape.parse(name)


@given(st.integers(0, 2**16), st.integers(1, 3 * CHECKED_ROWS), st.booleans())
@example(0, CHECKED_ROWS, False)  # All rows are the last rows.
@example(1, CHECKED_ROWS + 1, True)
def test_last_rows_are_the_references(seed: int, seq: int, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(seq, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    exact = reference_gradients(q, k, v, grad, is_causal=is_causal)
    rows = last_rows(q, k, v, grad, is_causal)
    assert len(rows) == (4 if is_causal or seq <= CHECKED_ROWS else 2)
    for got, truth in zip(rows, (exact.o, exact.dq, exact.dk, exact.dv), strict=False):
        torch.testing.assert_close(got, truth[-CHECKED_ROWS:], rtol=1e-10, atol=1e-10)


def bench(function: Any, *, is_causal: bool = True) -> AttentionBench:
    return AttentionBench(function, (1, 2, 80, 8), torch.float32, CPU, is_causal=is_causal)


def off_by(output: float = 0.0, **gradients: float) -> Any:
    """Return the plain formula with the last row of its output or of a gradient spoiled."""

    def spoil(by: float) -> Any:
        return lambda grad: grad + by * (torch.arange(grad.shape[-2]) == 79)[:, None]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        inputs = dict(zip("qkv", (q * 1, k * 1, v * 1), strict=True))
        for name, by in gradients.items():
            inputs[name].register_hook(spoil(by))
        return scaled_dot_prod_attention(*inputs.values(), **options) + output

    return function


@pytest.mark.parametrize("which", ["forward", "backward", "forward_backward"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_right_rows_pass_the_check(which: str, is_causal: bool) -> None:
    check = bench(scaled_dot_prod_attention, is_causal=is_causal).workload(which).check
    assert check is not None
    check()


@pytest.mark.parametrize(
    ("function", "which", "wrong"),
    [
        (off_by(1e-3), "forward", "o"),
        (off_by(float("nan")), "forward", "o"),
        (off_by(q=1e-3), "backward", "dq"),
        (off_by(k=1e-3), "forward_backward", "dk"),
        (off_by(v=1e-3), "backward", "dv"),
        (lambda q, k, v, is_causal: scaled_dot_prod_attention(q, k, v), "forward", "o"),
    ],
)
def test_wrong_rows_fail_the_check(function: Any, which: str, wrong: str) -> None:
    check = bench(function).workload(which).check
    assert check is not None
    with pytest.raises(AssertionError, match=f"^{wrong}: max error .* budget"):
        check()


def test_errors_are_against_fp64() -> None:
    exact = bench(scaled_dot_prod_attention).errors()
    assert set(exact) == ERRORS
    assert all(0 < error < 1e-5 for error in exact.values() if error is not None)
    shifted = bench(off_by(0.25)).errors()
    assert shifted["o_max_error"] == pytest.approx(0.25, rel=1e-4)
    assert shifted["o_rms_error"] == pytest.approx(0.25, rel=1e-4)
    assert shifted["dv_max_error"] == exact["dv_max_error"]


def failing(error: Exception) -> Workload:
    def step() -> None:
        raise error

    return Workload(step=step)


def test_what_a_peer_raises_is_a_row() -> None:
    with pytest.raises(NotMeasured) as end:
        run_once("sdpa", failing(RuntimeError("head dim 80\nand more")))
    assert end.value.status == "skipped"
    assert end.value.reason == "sdpa: raised RuntimeError: head dim 80"


def test_what_our_rows_raise_and_running_out_of_memory_are_errors() -> None:
    with pytest.raises(RuntimeError, match="head dim 80"):
        run_once("vectorized_torch", failing(RuntimeError("head dim 80")))
    with pytest.raises(torch.OutOfMemoryError):
        run_once("sdpa", failing(torch.OutOfMemoryError("CUDA out of memory")))


class TestPace:
    """A sweep ends a row where its next length would take too long."""

    def measured(self, monkeypatch: pytest.MonkeyPatch, first: float, second: float) -> Pace:
        clock = iter([0.0, first, 10.0, 10.0 + second])
        monkeypatch.setattr("pace.time.perf_counter", lambda: next(clock))
        pace, calls = Pace(call_seconds=0.5, first_seconds=30.0), []
        pace.measure("row", 1024, lambda: calls.append("run"), lambda: calls.append("wait"))
        assert calls == ["run", "wait"] * 2
        return pace

    def test_predicts_by_the_square_of_the_length(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pace = self.measured(monkeypatch, 5.0, 0.1)
        pace.refuse_slow("row", 2048)
        pace.refuse_slow("another row", 65536)
        with pytest.raises(NotMeasured) as end:
            pace.refuse_slow("row", 4096)
        assert end.value.reason == (
            "predicted 1.6 s a call from 0.1 s at 1024 tokens; the sweep allows 0.5 s"
        )

    def test_stops_after_a_first_call_that_took_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pace = self.measured(monkeypatch, 31.0, 0.001)
        with pytest.raises(NotMeasured, match="the first call took 31 s at 1024 tokens already"):
            pace.refuse_slow("row", 2048)

    def test_compiled_code_lives_as_long_as_the_shape(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resets: list[str] = []
        monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append("reset"))
        pace = Pace()
        for shape in ("a", "a", "b", "b", "a"):
            pace.begin(shape)
        assert len(resets) == 3


POINT = Point("sdpa", "fp32", Shape(1, 2, 16, 8), "forward_backward")


def test_harness_step_sums_and_adds_to_one_leafs_gradient() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
        assert is_causal
        seen.append((q, k, v))
        return q + 2 * k + 3 * v

    step = harness_step(flash, POINT, CPU)
    step()
    step()
    q, k, v = seen[0]
    assert q.shape == (2, 16, 8)
    assert not q.is_leaf
    (leaf,) = {part._base for part in (q, k, v)}
    assert leaf is not None
    assert leaf.grad is not None
    assert [part.unique().item() for part in leaf.grad] == [2.0, 4.0, 6.0]


def test_harness_calls_rows_and_autograd_functions_in_one_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (torch.randn(2, 16, 8) for _ in range(3))
    for causal in (True, False):
        expected = ATTENTION["sdpa"].load()(q, k, v, is_causal=causal)
        assert torch.equal(harness_function("sdpa")(q, k, v, causal), expected)
    monkeypatch.setitem(APPLIED, "sdpa", "torch.autograd.function:Function")
    assert harness_function("sdpa") == torch.autograd.Function.apply
    for row, target in APPLIED.items():
        if row in ATTENTION and row != "sdpa":
            assert target.startswith("cs336_systems.attention.")
            assert callable(harness_function(row))


def test_harness_check_refuses_a_wrong_function() -> None:
    right = harness_check(harness_function("sdpa"), POINT, CPU)
    assert right is not None
    right()
    wrong = harness_check(lambda q, k, v, is_causal: q + k + v, POINT, CPU)
    assert wrong is not None
    with pytest.raises(AssertionError, match="o: max error"):
        wrong()
