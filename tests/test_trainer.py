"""The trainer's command line: what it writes, what it refuses, and how it is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loop_runs import SMALL, changed, make_data, saved
from processes import environment, wait_until

from cs336_systems.train.config import PipelineConfig, from_dict, to_dict
from cs336_systems.train.run_log import read_log
from cs336_systems.train.trainer import main

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    (folder / "config.json").write_text(json.dumps(to_dict(SMALL)))
    return folder


def arguments(data: Path, out: Path) -> list[str]:
    paths = {
        "config": data / "config.json",
        "tokenizer": data / "tokenizer.json",
        "train_tokens": data / "train.npy",
        "validation_tokens": data / "validation.npy",
        "output_dir": out,
    }
    return [text for name, path in paths.items() for text in (f"--{name}", str(path))]


def test_options_go_over_the_config(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--training.num_steps", "4", "--checkpointing_interval", "3", "--ddp_wrapper=fsdp"]
    assert main([*arguments(data, tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"step 4: training loss \S+, validation loss \S+, perplexity \S+\n", out)
    written = from_dict(PipelineConfig, json.loads((tmp_path / "config.json").read_text()))
    changes = {
        "output_dir": str(tmp_path),
        "training.num_steps": 4,
        "training.ddp_wrapper": "fsdp",
        "checkpointing.checkpointing_interval": 3,
    }
    assert written == changed(SMALL, changes)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*-step-*"))
    assert names == ["000001-step-3", "000002-step-4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.num_steps", "x"], "training: num_steps must be an integer, got 'x'"),
        (["--training.steps", "4"], "trainer: unrecognized arguments: --training.steps 4"),
        (["--config", "nowhere.json"], "config: nowhere.json: No such file or directory"),
        (["--tokenizer", "nowhere.json"], "tokenizer: nowhere.about.json: No such file or direct"),
        (["--train_tokens", "nowhere.npy"], "tokens: nowhere.json: No such file or directory"),
        (["--model.context_length", "1000000"], "tokens: "),
        (["--output_dir", "/proc/nowhere"], "train: /proc/nowhere/config.json cannot be written"),
        (
            ["--training.num_ranks", "2", "--ddp_wrapper", "flat"],
            "training: num_ranks must be the 1 that were started",
        ),
    ],
)
def test_what_is_refused_is_one_line_and_status_2(
    options: list[str],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments(data, tmp_path), *options]) == 2
    got = capsys.readouterr()
    assert got.out == ""
    [line] = got.err.splitlines()
    assert line.startswith(message)


def test_tokens_of_another_tokenizer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_data(tmp_path, megabytes=0.06)
    options = ["--train_tokens", str(other / "train.npy")]
    assert main([*arguments(data, tmp_path / "out"), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "must be encoded by the tokenizer with sha256" in line


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "SIGTERM" in text
    for name in ("--training.num_steps", "--checkpointing_interval", "--validation_tokens"):
        assert name in text
    assert "Steps between checkpoints; 0 or less: only at the end" in " ".join(text.split())


def torchrun(data: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *("-m", "cs336_systems.train.trainer", *arguments(data, out), *options),
        ],
        cwd=out.parent,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    """As a cluster does it; the launcher hands the signal to its ranks and waits for them."""
    out = tmp_path / "out"
    options = ["--ddp_wrapper", "flashddp", "--training.num_steps", "100000"]
    options += ["--training.warmup_steps", "2", "--evaluation.interval", "0"]
    process = torchrun(data, out, *options)
    log = out / "log.jsonl"
    assert wait_until(lambda: len(read_log(log)) >= 3 or process.poll() is not None, 60)
    process.send_signal(signal.SIGTERM)
    printed, complaint = process.communicate(timeout=60)
    stopped = re.search(r"interrupted after step (\d+), which is saved in", printed)
    assert stopped is not None, complaint
    state, step = saved(out)
    assert step == state["step"] == int(stopped[1])

    last = ["--training.num_steps", str(step + 3), "--training.num_ranks", "1"]
    assert main([*arguments(data, out), *options, *last, "--ddp_wrapper", "none"]) == 0
    steps = [line["step"] for line in read_log(out / "log.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == step + 3


def test_what_ranks_are_refused_is_one_line_too(data: Path, tmp_path: Path) -> None:
    process = torchrun(data, tmp_path / "out", "--training.batch_size", "7", "--ddp_wrapper=flat")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode != 0
    refused = "training: batch_size must be a multiple of num_ranks (2), got 7"
    assert [line for line in complaint.splitlines() if refused in line] == [refused]
    assert "Traceback" not in complaint.partition(refused)[0]
