"""The experiments' commands: their arguments, runs that were cut short, and whole tiny runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_fixtures as fx
from processes import environment
from test_report_experiments import attention_sweep, lm_run

from cs336_systems.experiments import benchmark_attention_sweep as attention
from cs336_systems.experiments import benchmark_lm_matrix as matrix
from cs336_systems.experiments import suite

ROOT = Path(__file__).parents[1]
MATRIX_FILES = [
    "lm_matrix_memory.png", "lm_matrix_report.md", "lm_matrix_results.csv",
    "lm_matrix_throughput.png", "lm_matrix_time.png",
]  # fmt: skip
SWEEP_FILES = [
    "attention_sweep_forward.png", "attention_sweep_heatmap.png", "attention_sweep_report.md",
    "attention_sweep_results.csv", "attention_sweep_scaling.png",
]  # fmt: skip
Main = Callable[[Sequence[str]], int]


def given(module: Any, line: str) -> list[str]:
    """Return the pytest options of a command line."""
    options: list[str] = module.options_of(module.parser().parse_args(line.split()))
    return options


# --- arguments ---


def test_the_seeds_matrix_is_understood(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        np.save(tmp_path / f"{name}.npy", np.zeros(9, dtype=np.uint16))
    options = given(
        matrix,
        f"--train_path {tmp_path}/train.npy --val_path {tmp_path}/valid.npy --epochs 5 "
        "--tr_batch_size 8 --context_length 256 --vocab_size 10_000 --d_model 512 --d_ff 4096 "
        "--num_layers 24 --num_heads 16 --kernels scaled_dot_prod_attention vectorized_torch "
        "flash_attention_triton --wrappers none naive flashddp torch_ddp",
    )
    assert options == [
        "--rows=scaled_dot_prod_attention,vectorized_torch,flash_attention_triton",
        "--strategies=none,naive,flashddp,torch_ddp",
        "--lm-epochs=5",
        "--rank-batch=8",
        "--contexts=256",
        "--lm-model=d_model=512,d_ff=4096,num_layers=24,num_heads=16,vocab_size=10000",
        f"--train-path={tmp_path}/train.npy",
        f"--val-path={tmp_path}/valid.npy",
    ]


def test_what_is_not_given_is_the_benchmarks_to_choose() -> None:
    rows = "--rows=scaled_dot_prod_attention,vectorized_torch,flash_attention_triton"
    assert given(matrix, "") == [rows, "--strategies=none,naive,flashddp,torch_ddp"]
    assert given(matrix, "--smoke") == ["--smoke"]
    assert given(matrix, "--kernels sdpa sdpa --smoke --device cpu --ranks 3 --precision bf16") == [
        "--rows=sdpa", "--strategies=none,naive,flashddp,torch_ddp", "--ranks=3",
        "--precisions=bf16", "--smoke", "--device=cpu",
    ]  # fmt: skip


def test_the_seeds_sweeps_are_understood() -> None:
    line = "--custom_tiers 128:64 256:128 512:256 1024:512 --warmup 10 --iters 50"
    rows = "--rows=scaled_dot_prod_attention,vectorized_torch,flash_attention_triton,sdpa"
    numbers = ["--warmup-rounds=10", "--rounds=50"]
    assert given(attention, line) == [rows, "--tiers=128:64,256:128,512:256,1024:512", *numbers]
    (tiers,) = [option for option in given(attention, "") if option.startswith("--tiers=")]
    pairs = tiers.removeprefix("--tiers=").split(",")
    assert len(set(pairs)) == 25
    assert [pairs[0], pairs[-1]] == ["128:128", "2048:2048"]
    more = "--custom_tiers 64 --head_dims 64 128 --dtype fp16 --causal --num_heads 2 --smoke"
    assert given(attention, more) == [
        "--tiers=64:64", "--head-dims=64,128", "--dtypes=fp16", "--sweep-causal",
        "--warmup-rounds=5", "--rounds=20", "--sweep-heads=2", "--smoke",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (matrix.main, "--kernels flash9", "--kernels must be one of scaled_dot_prod_attention, "),
        (matrix.main, "--wrappers none ddp", "--wrappers must be one of none, naive, flat, "),
        (matrix.main, "--train_path no.npy", "--train_path must be a file, got 'no.npy'"),
        (attention.main, "--kernels flash9", "--kernels must be one of scaled_dot_prod_attention"),
        *(
            (attention.main, f"--custom_tiers 128:64 {word}",
             f"--custom_tiers must be QUERIES:KEYS, both powers of two, e.g. 128:64, got '{word}'")
            for word in ("100:64", "128:0", "128:64:2", ":", "x", "128:", "²:4")
        ),
    ],
)  # fmt: skip
def test_a_users_fault_is_one_line(
    main: Main, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (matrix.main, "--epochs 0", "argument --epochs: must be an integer of at least 1, got 0"),
        (matrix.main, "--d_model big", "argument --d_model: must be an integer of at least 1"),
        (attention.main, "--iters 1.5", "argument --iters: must be an integer of at least 1"),
    ],
)
def test_wrong_numbers_are_refused(
    main: Main, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("main", [matrix.main, attention.main])
def test_help_lists_rows_files_and_examples(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    files = MATRIX_FILES if main is matrix.main else SWEEP_FILES
    for part in ("flash_attention_triton", "examples:", "--smoke", *files):
        assert part in text


# --- runs that were cut short, on a suite that only pretends ---


class FakeSuite:
    """In place of pytest: writes what a run would leave behind, and notes what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.skipped: list[int] = []
        self.leave: Callable[[Path], int] = lambda path: 0
        monkeypatch.setattr(suite, "_pytest", self._run)
        monkeypatch.setattr(suite, "this_machine", lambda device: "a machine")

    def _run(self, experiment: suite.Experiment, path: Path, done: Sequence[str]) -> int:
        self.skipped.append(sum(len(suite.finished_cases([Path(name)])) for name in done))
        return self.leave(path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSuite:
    return FakeSuite(monkeypatch)


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal.jsonl")


def test_a_killed_run_is_continued_and_a_finished_one_is_not(
    fake: FakeSuite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = attention_sweep()

    def killed(path: Path) -> int:
        fx.write_journal(journal_of(path), fx.document(*cases[:7]), tail='{"benchmark": {"na')
        return -9

    def interrupted(path: Path) -> int:
        fx.write(path, fx.document(*cases[7:9]))
        return 2

    def rest(path: Path) -> int:
        fx.write(path, fx.document(*cases[9:]))
        return 0

    run = ["--output_dir", str(tmp_path)]
    for fake.leave, status in ((killed, -9), (interrupted, 2), (rest, 0)):
        assert list(tmp_path.glob("*.csv")) == []
        assert attention.main(run) == status
    assert fake.skipped == [0, 7, 9]
    assert "continues a run that was cut short" in capsys.readouterr().out
    csv = (tmp_path / "attention_sweep_results.csv").read_text()
    assert len(csv.splitlines()) == 1 + len(cases)

    fake.leave = rest
    assert attention.main(run) == 0
    assert fake.skipped[-1] == 0
    csv = (tmp_path / "attention_sweep_results.csv").read_text()
    assert len(csv.splitlines()) == 1 + len(cases) - 9


def test_other_options_are_another_run(fake: FakeSuite, tmp_path: Path) -> None:
    def killed(path: Path) -> int:
        fx.write_journal(journal_of(path), fx.document(*attention_sweep()[:3]))
        return -9

    fake.leave = killed
    for line in ("", "--iters 7", ""):
        assert attention.main([*line.split(), "--output_dir", str(tmp_path)]) == -9
    assert fake.skipped == [0, 0, 3]


def test_a_run_killed_after_its_last_case_is_reported(fake: FakeSuite, tmp_path: Path) -> None:
    def killed(path: Path) -> int:
        fx.write_journal(journal_of(path), fx.document(*attention_sweep()))
        return -9

    def nothing_left(path: Path) -> int:
        path.touch()  # pytest-benchmark opens its file at once and writes none without a case.
        return 0

    for fake.leave, status in ((killed, -9), (nothing_left, 0)):
        assert attention.main(["--output_dir", str(tmp_path)]) == status
    assert sorted(path.name for path in tmp_path.glob("*.*")) == SWEEP_FILES


def test_a_wrong_case_is_an_exit_status_and_the_others_are_kept(
    fake: FakeSuite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_wrong(path: Path) -> int:
        fx.write(path, fx.document(*attention_sweep()[1:]))
        return 1

    fake.leave = one_wrong
    assert attention.main(["--output_dir", str(tmp_path)]) == 1
    assert "some cases were wrong" in capsys.readouterr().out
    assert (tmp_path / "attention_sweep_report.md").exists()
    fake.leave = lambda path: 1
    assert attention.main(["--output_dir", str(tmp_path / "none")]) == 1
    assert "no case was measured" in capsys.readouterr().err
    fake.leave = lambda path: 4
    assert attention.main(["--output_dir", str(tmp_path / "none")]) == 2


def test_a_folder_that_refuses_is_one_line(
    fake: FakeSuite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert attention.main(["--output_dir", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


# --- whole runs ---


def run(program: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *options, "--device", "cpu"],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.distributed
def test_a_matrix_is_trained_on_a_token_file(tmp_path: Path) -> None:
    train = tmp_path / "train.npy"
    np.save(train, np.tile(np.arange(7, dtype=np.uint8), 200))
    out = tmp_path / "out"
    result = run(
        ["cs336_systems/experiments/benchmark_lm_matrix.py"],
        "--smoke", "--train_path", str(train), "--val_path", str(train), "--output_dir", str(out),
        "--kernels", "scaled_dot_prod_attention", "flash_attn_4", "--wrappers", "flashddp",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[   2/2 " in result.stdout
    assert files_in(out) == MATRIX_FILES
    (measured,) = (out / "measurements").glob("*.json")
    data = json.loads(measured.read_text())
    (row,) = (entry["extra_info"] for entry in data["benchmarks"])
    assert (row["case"]["strategy"], row["case"]["ranks"]) == ("flashddp", 2)
    # Seven tokens in turn: any step of training makes the next one less of a surprise.
    assert row["metrics"]["last_loss"] < row["metrics"]["first_loss"]
    assert row["metrics"]["validation_loss"] < row["metrics"]["first_loss"]
    assert row["metrics"]["epoch_s"] > 0
    assert data["cs336_systems"]["run"]["command"].startswith(
        "python -m cs336_systems.experiments.benchmark_lm_matrix --smoke "
    )
    report = (out / "lm_matrix_report.md").read_text()
    for part in ("train.npy (1,400 tokens)", "## Runs", "DDP speed-up", "1 layers, 2 heads"):
        assert part in report


def test_a_sweep_of_a_custom_tier_is_measured(tmp_path: Path) -> None:
    result = run(
        ["-m", "cs336_systems.experiments.benchmark_attention_sweep"],
        *("--smoke", "--custom_tiers", "16:8", "--kernels", "vectorized_torch", "flash_attn_4"),
        *("--output_dir", str(tmp_path)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert files_in(tmp_path) == SWEEP_FILES
    csv = (tmp_path / "attention_sweep_results.csv").read_text()
    assert len(csv.splitlines()) == 3
    assert "not_installed" in csv
    report = (tmp_path / "attention_sweep_report.md").read_text()
    assert "package flash_attn.cute is not installed" in report


def test_lm_runs_are_no_sweep(fake: FakeSuite, tmp_path: Path) -> None:
    def foreign(path: Path) -> int:
        fx.write(path, fx.document(lm_run("sdpa", "none")))
        return 0

    fake.leave = foreign
    assert attention.main(["--output_dir", str(tmp_path)]) == 2
