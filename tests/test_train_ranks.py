"""Training on ranks: resumed to the bit, at another number of them, and stopped by any of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import loop_runs
import pytest
import torch
from checkpoint_ranks import same
from loop_runs import ROUNDING, make_data, run, saved, weights

from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.parallel.launch import RankFailedError, RankPool
from cs336_systems.train.run_log import read_log

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

OURS = [name for name, row in STRATEGIES.items() if not row.peer and name != "none"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as own:
        yield own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run in one process."""
    out = tmp_path_factory.mktemp("alone")
    with init_from_environment("gloo"):
        run(data, str(out))
    return out


def numbers(out: Path, name: str) -> list[float]:
    return [line[name] for line in read_log(out / "log.jsonl") if name in line]


@pytest.mark.parametrize("strategy", OURS)
def test_two_ranks_are_one_and_resume_to_the_bit(
    ranks: RankPool, strategy: str, data: str, alone: Path, tmp_path: Path
) -> None:
    changes = {"training.ddp_wrapper": strategy, "training.micro_batch_size": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result, other = ranks.run(loop_runs.run, data, str(whole), changes)
    assert result == other
    for name in ("loss", "validation_loss", "grad_norm"):
        assert numbers(whole, name) == pytest.approx(numbers(alone, name), rel=ROUNDING)
    torch.testing.assert_close(weights(whole), weights(alone), rtol=0, atol=ROUNDING)

    first, second = ranks.run(loop_runs.run_broken, data, str(broken), changes, 3)[0]
    # What rank 0 was told in step 3 all ranks have heard of by the end of the next.
    assert (first.was_interrupted, first.final_step) == (True, 4)
    assert (second.was_interrupted, second.final_step) == (False, 8)
    assert second.validation_loss == result.validation_loss
    assert same(weights(broken), weights(whole))
    assert same(*(saved(out)[0] for out in (broken, whole)))
    for name in ("loss", "mean_loss"):
        assert numbers(broken, name) == numbers(whole, name)
    assert [line["step"] for line in read_log(broken / "log.jsonl")] == [2, 4, 6, 8]


def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: RankPool, data: str, alone: Path, tmp_path: Path
) -> None:
    """Two ranks in shards, then one alone, then two that hold all, then shards again."""
    out = str(tmp_path)

    def together(strategy: str, step: int | None) -> None:
        changes = {"training.ddp_wrapper": strategy}
        at = None if step is None else (step, 1, signal.SIGTERM)
        results = ranks.run(loop_runs.run, data, out, changes, signal_at=at)
        assert [result.was_interrupted for result in results] == [at is not None] * 2

    together("fsdp", 1)
    assert len(saved(out)[0]["rng"]) == 2
    with init_from_environment("gloo"):
        result = run(data, out, signal_at=(4, 0, signal.SIGTERM))
    assert (result.final_step, result.was_interrupted) == (4, True)
    together("zero1", 5)
    together("flashddp", None)
    for name in ("loss", "validation_loss", "grad_norm"):
        assert numbers(tmp_path, name) == pytest.approx(numbers(alone, name), rel=ROUNDING)
    torch.testing.assert_close(weights(out), weights(alone), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all(
    ranks: RankPool, number: signal.Signals, data: str, tmp_path: Path
) -> None:
    changes = {"training.ddp_wrapper": "fsdp"}
    results = ranks.run(loop_runs.run, data, str(tmp_path), changes, signal_at=(5, 1, number))
    assert [(r.was_interrupted, r.final_step) for r in results] == [(True, 6)] * 2
    state, step = saved(tmp_path)
    assert (step, state["step"]) == (6, 6)
    assert not torch.equal(*(rng["torch"] for rng in state["rng"]))


def test_a_signal_in_the_last_step_comes_too_late(
    ranks: RankPool, data: str, tmp_path: Path
) -> None:
    changes = {"training.ddp_wrapper": "naive"}
    at = (8, 0, signal.SIGTERM)
    results = ranks.run(loop_runs.run, data, str(tmp_path), changes, signal_at=at)
    assert [(r.was_interrupted, r.final_step) for r in results] == [(False, 8)] * 2
    assert weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "training: ddp_wrapper must communicate when num_ranks is 2, got 'none', with which"),
        (
            {"training.ddp_wrapper": "flat", "training.batch_size": 7},
            "training: batch_size must be a multiple of num_ranks (2), got 7",
        ),
        (
            {"training.ddp_wrapper": "flat", "training.num_ranks": 4},
            "training: num_ranks must be the 2 that were started (torchrun --nproc-per-node start",
        ),
    ],
)
def test_what_ranks_cannot_train(
    ranks: RankPool, changes: dict[str, object], message: str, data: str, tmp_path: Path
) -> None:
    [error, other] = ranks.run(loop_runs.error_of, data, str(tmp_path), changes)
    assert error == other
    assert error.startswith(message)
    assert "\n" not in error


def test_data_that_one_rank_cannot_read(ranks: RankPool, data: str, tmp_path: Path) -> None:
    [here, there] = ranks.run(loop_runs.error_where_data_is_missing, data, str(tmp_path))
    missing = "tokens: nowhere/train.json: No such file or directory"
    assert (here, there) == (f"train: rank 1 was refused: {missing}", missing)


def test_a_rank_that_dies_leaves_a_run_to_go_on_with(
    ranks: RankPool, data: str, alone: Path, tmp_path: Path
) -> None:
    changes = {"training.ddp_wrapper": "zero1", "checkpointing.checkpointing_interval": 2}
    killed = (6, 1, signal.SIGKILL)
    with pytest.raises(RankFailedError, match="rank 1 of 2: was killed by SIGKILL"):
        ranks.run(loop_runs.run, data, str(tmp_path), changes, signal_at=killed)
    assert saved(tmp_path)[1] in (2, 4)
    ranks.run(loop_runs.run, data, str(tmp_path), changes)
    torch.testing.assert_close(weights(tmp_path), weights(alone), rtol=0, atol=ROUNDING)
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")]
    assert steps == [2, 4, 6, 8]
