"""Does one command lead from text to a trained model, again from where it was, or say why not?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import StandIn, small, written
from processes import environment, wait_until

from cs336_systems.errors import UsageError
from cs336_systems.train.config import PipelineConfig, read_config
from cs336_systems.train.loop import TrainResult
from cs336_systems.train.pipeline import DEFAULT_CONFIG, run
from cs336_systems.train.pipeline_training import exit_status
from cs336_systems.train.rank_launcher import Ended, Launched
from cs336_systems.train.run_folder import StoppedError, alone_in

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

SCRIPT = Path(__file__).parents[1] / "cs336_systems" / "experiments" / "run_pipeline.py"
# Nats a token on the validation split; to guess all 1024 tokens alike costs 6.9. The whole run's
# 300 steps end at about 1.4.
BOUND_AFTER_40_STEPS = 3.5


def lines_of(capsys: pytest.CaptureFixture[str], start: str = "training") -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


def test_training_gets_the_data_and_finds_its_config_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train = small(tmp_path), StandIn()
    assert run(config, train=train) == 0
    (call,) = train.calls
    assert call["config"] == call["saved"] == config
    assert call["tokenizer"].vocab_size == 300
    for split in ("train", "validation"):
        assert call[f"{split}_tokens"].exists()
    assert capsys.readouterr().out.endswith("sample: Once there was a kite.\n")


def test_what_is_trained_is_shown_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train = small(tmp_path), StandIn()
    run(config, train=train)
    first = lines_of(capsys)
    assert run(config, train=train) == 0
    assert len(train.calls) == 1
    assert first[0] == "training: runs, not done yet"
    assert lines_of(capsys) == [
        "training: up to date (config, tokenizer, tokens unchanged)",
        "training: step 6, train loss 2.000, validation loss 1.500 (perplexity 4.48)",
    ]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"num_steps": 9}}, "training.num_steps changed from 6 to 9"),
        ({"evaluation": {"top_k": None}}, "evaluation.top_k changed from 50 to null"),
        ({"tokenizer": {"vocab_size": 290}}, "tokenizer changed, tokens changed"),
        ({"checkpointing": {"resume": False}}, "checkpointing.resume is false"),
    ],
)
def test_training_that_has_something_to_do_says_what(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, dict[str, Any]],
    reason: str,
) -> None:
    train = StandIn()
    run(small(tmp_path), train=train)
    capsys.readouterr()
    assert run(small(tmp_path, **sections), train=train) == 0
    assert lines_of(capsys)[0] == f"training: runs, {reason}"
    assert len(train.calls) == 2


def test_a_lost_model_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, train = small(tmp_path), StandIn()
    run(config, train=train)
    (tmp_path / "out" / "model.pt").unlink()
    run(config, train=train)
    assert "training: runs, model.pt is missing" in lines_of(capsys)
    assert len(train.calls) == 2


def test_training_that_was_stopped_goes_on_with_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    assert run(config, train=StandIn(stops_at=4)) == 0
    line = "training: stopped at step 4 of 6 and saved; the same command goes on from there"
    assert lines_of(capsys)[-1] == line
    again = StandIn()
    assert run(config, train=again) == 0
    assert len(again.calls) == 1
    assert run(config, train=again) == 0
    assert len(again.calls) == 1


def test_data_of_before_is_trained_on_without_a_look_at_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small(tmp_path), train=StandIn(stops_at=1))
    capsys.readouterr()
    train = StandIn()
    gone = small(tmp_path, corpus={"source": "file:gone.txt"})
    assert run(gone, skip_data=True, train=train) == 0
    assert len(train.calls) == 1
    assert lines_of(capsys, "corpus") == []


def test_another_run_in_the_folder_is_refused_before_its_tokens_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small(tmp_path), train=StandIn())
    (tmp_path / "out" / "checkpoints" / "000001-step-6").mkdir(parents=True)
    before = (tmp_path / "out" / "data" / "train.npy").read_bytes()
    for sections, name in [
        ({"tokenizer": {"vocab_size": 290}}, "tokenizer.vocab_size must be 300"),
        ({"corpus": {"seed": 1}}, "corpus.seed must be 0"),
        ({"training": {"seed": 1}}, "training.seed must be 0"),
    ]:
        with pytest.raises(UsageError, match=f"^resume: {name} as in the checkpoint, got "):
            run(small(tmp_path, **sections), train=StandIn())
        anew = sections | {"checkpointing": {"resume": False}}
        assert (tmp_path / "out" / "data" / "train.npy").read_bytes() == before
    assert run(small(tmp_path, **anew), train=StandIn()) == 0


def test_one_run_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    config = small(tmp_path)
    with (
        alone_in(Path(config.output_dir)),
        pytest.raises(UsageError, match="output_dir must be a folder that no other run is writing"),
    ):
        run(config, train=StandIn())
    assert run(config, train=StandIn()) == 0


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    config = small(tmp_path)
    left = [tmp_path / "out" / "config.json.1.part", tmp_path / "out/data/train.npy.1.part"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run(config, train=StandIn())
    assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_leaves_nothing_half_written(
    tmp_path: Path, number: signal.Signals
) -> None:
    def train(config: PipelineConfig, **given: Any) -> TrainResult:
        with alone_in(tmp_path / "other"):
            os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heeded")

    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"stopped by {number.name}; the same command goes on"):
        run(small(tmp_path), train=train)
    assert signal.getsignal(number) is before
    assert not list(tmp_path.glob("**/*.part"))
    # The folder is free again.
    assert run(small(tmp_path), train=StandIn()) == 0


@pytest.mark.parametrize(
    ("statuses", "expected", "named"),
    [
        ([0, 0], 0, []),
        ([1, 0], 1, ["rank 0 of 2 ended with status 1"]),
        ([0, 3], 1, ["rank 1 of 2 ended with status 3, its last lines:", "words of 1"]),
        ([0, 2], 2, ["rank 1 of 2 ended with status 2, its last lines:", "words of 1"]),
        # Rank 0 has said in its one line what the others say too.
        ([2, 2], 2, []),
        ([2, 1], 2, ["rank 1 of 2 ended with status 1, its last lines:", "words of 1"]),
        ([-9, -9], 1, ["rank 0 of 2 ended with status -9", "rank 1 of 2 ended with status -9"]),
    ],
)
def test_the_rank_that_failed_is_named(
    capsys: pytest.CaptureFixture[str], statuses: list[int], expected: int, named: list[str]
) -> None:
    printed = [f"words of {rank}" if rank else "" for rank in range(2)]
    ranks = [Ended(rank, status, printed[rank]) for rank, status in enumerate(statuses)]
    assert exit_status(Launched(ranks, None)) == expected
    said = capsys.readouterr().err
    assert [words for words in named if words not in said] == []
    assert said == "" or named


def test_ranks_that_were_stopped_before_they_could_save() -> None:
    ranks = [Ended(0, -15, ""), Ended(1, -9, "")]
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as caught:
        exit_status(Launched(ranks, signal.SIGTERM))
    assert caught.value.number == signal.SIGTERM
    assert exit_status(Launched([Ended(0, 0, ""), Ended(1, 0, "")], signal.SIGTERM)) == 0


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--no-logging.progress", *arguments]


def without_paths() -> dict[str, str]:
    """An environment as a user has it, in a fresh clone."""
    variables = environment(OMP_NUM_THREADS="1")
    del variables["PYTHONPATH"]
    return variables


def test_the_default_command_from_a_clone(tmp_path: Path) -> None:
    fewer = ["--training.num_steps", "40", "--training.warmup_steps", "10"]
    fewer += ["--evaluation.num_batches", "2", "--evaluation.sample_tokens", "32"]
    done = subprocess.run(
        command(*fewer), cwd=tmp_path, env=without_paths(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"sample: {read_config(PipelineConfig, DEFAULT_CONFIG).evaluation.sample_prompt}" in (
        done.stdout
    )
    folder = tmp_path / "artifacts" / "default"
    assert json.loads((folder / "result.json").read_text())["validation_loss"] < (
        BOUND_AFTER_40_STEPS
    )
    saved = read_config(PipelineConfig, folder / "config.json")
    assert (saved.training.num_steps, saved.corpus.megabytes) == (40, 4)
    for name in ("model.pt", "model_config.json", "sample.txt", "loss.png", "log.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.glob("**/*.part"))


def test_two_ranks_are_stopped_and_go_on(tmp_path: Path) -> None:
    config = small(
        tmp_path,
        training={"num_ranks": 2, "ddp_wrapper": "flashddp", "num_steps": 300},
        evaluation={"interval": 0},
    )
    arguments = command("--config", written(config, tmp_path))
    log = tmp_path / "out" / "log.jsonl"
    environment_ = without_paths()
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment_, stdout=subprocess.PIPE, text=True
    ) as first:
        assert wait_until(lambda: log.exists() and '"step": 10,' in log.read_text(), 60)
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 0
    assert "and saved; the same command goes on from there" in out
    stopped_at = json.loads((tmp_path / "out" / "result.json").read_text())["final_step"]
    assert 10 <= stopped_at < 300
    again = subprocess.run(
        arguments, cwd=tmp_path, env=environment_, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "tokens: up to date (tokenizer, corpus unchanged)" in again.stdout
    assert f"-step-{stopped_at}" in again.stderr
    assert "training: step 300, train loss" in again.stdout
