"""Does a run go on where it was, to the bit, and only if it is the same run?"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import same
from loop_runs import ROUNDING, log_of, make_data, run, run_broken, saved, weights

from cs336_systems.errors import UsageError
from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.run_log import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Be the only rank of a group."""
    with init_from_environment("gloo"):
        yield


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    strategy: str, data: str, tmp_path: Path
) -> None:
    changes = {
        "training.ddp_wrapper": strategy,
        "training.micro_batch_size": 4,
        "training.optimizer": "torch_adamw" if strategy.startswith("torch") else "adamw",
    }
    whole = run(data, str(tmp_path / "whole"), changes)
    first, second = run_broken(data, str(tmp_path / "broken"), changes, stop_at=3)
    assert (first.was_interrupted, first.final_step, first.validation_loss) == (True, 3, None)
    assert (second.was_interrupted, second.final_step) == (False, 8)
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert same(*(saved(tmp_path / name)[0] for name in ("broken", "whole")))
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert (second.train_loss, second.sample) == (whole.train_loss, whole.sample)


def test_a_run_moves_from_strategy_to_strategy(data: str, tmp_path: Path) -> None:
    """Each takes a step from what another one has saved; alone, all compute the same."""
    rows = list(STRATEGIES)
    out = str(tmp_path / "moving")
    length = {"training.num_steps": len(rows)}
    for step, strategy in enumerate(rows[:-1], start=1):
        changes = {**length, "training.ddp_wrapper": strategy}
        result = run(data, out, changes, signal_at=(step, 0, signal.SIGTERM))
        assert (result.final_step, result.was_interrupted) == (step, True)
    run(data, out, {**length, "training.ddp_wrapper": rows[-1]})
    run(data, str(tmp_path / "whole"), length)
    torch.testing.assert_close(weights(out), weights(tmp_path / "whole"), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("interval", "steps"), [(3, [3, 6, 8]), (0, [8]), (-1, [8]), (100, [8]), (4, [4, 8])]
)
def test_when_checkpoints_are_saved(
    interval: int, steps: list[int], data: str, tmp_path: Path
) -> None:
    names = {"checkpointing.checkpointing_interval": interval, "checkpointing.keep": 9}
    run(data, str(tmp_path), names)
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("*-step-*"))
    assert [int(name.rpartition("-")[2]) for name in found] == steps


def test_only_the_newest_are_kept(data: str, tmp_path: Path) -> None:
    names = {"checkpointing.checkpointing_interval": 1, "checkpointing.keep": 3}
    run(data, str(tmp_path), names)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name[-6:] for name in found] == ["step-6", "step-7", "step-8", "latest"]


def test_a_damaged_checkpoint_is_passed_over(data: str, tmp_path: Path) -> None:
    names = {"checkpointing.checkpointing_interval": 3, "checkpointing.keep": 9}
    run(data, str(tmp_path / "whole"), names)
    broken = Path(shutil.copytree(tmp_path / "whole", tmp_path / "broken"))
    for name in ("000002-step-6", "000003-step-8"):
        file = broken / "checkpoints" / name / "rank0.pt"
        file.write_bytes(file.read_bytes()[:-100])
    run(data, str(broken), names)
    assert same(weights(broken), weights(tmp_path / "whole"))
    assert log_of(broken) == log_of(tmp_path / "whole")


def test_when_all_are_damaged_nothing_is_thrown_away(data: str, tmp_path: Path) -> None:
    run(data, str(tmp_path))
    before = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "checkpoints" / "000001-step-8" / "rank0.pt").write_bytes(b"no checkpoint")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: rank 0 could not load 000001-step-8: "
    ):
        run(data, str(tmp_path))
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_finished_run_is_finished_again_and_can_be_made_longer(data: str, tmp_path: Path) -> None:
    first = run(data, str(tmp_path))
    before = weights(tmp_path)
    again = run(data, str(tmp_path))
    assert (again.train_loss, again.validation_loss, again.sample) == (
        *(first.train_loss, first.validation_loss),
        first.sample,
    )
    assert same(weights(tmp_path), before)
    longer = run(data, str(tmp_path), {"training.num_steps": 10})
    assert longer.final_step == 10
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10]


def test_starting_anew(data: str, tmp_path: Path) -> None:
    run(data, str(tmp_path), {"training.num_steps": 6})
    changes = {"checkpointing.resume": False, "training.seed": 1, "training.num_steps": 4}
    assert run(data, str(tmp_path), changes).final_step == 4
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4]
    assert saved(tmp_path)[1] == 4


FREE = {
    "name": "another",
    "output_dir": "elsewhere",
    "training.num_steps": 9,
    "training.micro_batch_size": 2,
    "training.ddp_wrapper": "zero1",
    "evaluation.num_batches": 1,
    "logging.interval": 3,
    "checkpointing.keep": 1,
    "corpus.download_dir": "elsewhere",
}


def test_what_may_differ_when_a_run_goes_on(data: str, tmp_path: Path) -> None:
    run(data, str(tmp_path), {"training.num_steps": 2})
    assert run(data, str(tmp_path), FREE).final_step == 9


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"training.seed": 1}, "resume: training.seed must be 0 as in the checkpoint, got 1; "),
    ({"training.batch_size": 4}, "resume: training.batch_size must be 8 as in the checkpoint, "),
    ({"training.betas": (0.9, 0.9)}, "resume: training.betas must be [0.9, 0.95] as in the check"),
    ({"training.optimizer": "torch_adamw"}, "resume: training.optimizer must be 'adamw' as in "),
    ({"model.d_ff": 128}, "resume: model.d_ff must be 64 as in the checkpoint, got 128; another "),
    ({"model.context_length": 8}, "resume: model.context_length must be 16 as in the checkpoint"),
    ({"training.num_steps": 2}, "resume: training.num_steps must be at least the checkpoint's st"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS, ids=[str(list(c)) for c, _ in OTHERS])
def test_another_run_is_not_gone_on_with(
    changes: dict[str, Any], message: str, data: str, tmp_path: Path
) -> None:
    run(data, str(tmp_path), {"training.num_steps": 3})
    with pytest.raises(UsageError, match=f"^{re.escape(message)}") as caught:
        run(data, str(tmp_path), changes)
    assert "\n" not in str(caught.value)
    assert saved(tmp_path)[1] == 3


@pytest.mark.parametrize("what", ["tokens", "tokenizer"])
def test_other_data_are_not_gone_on_with(what: str, data: str, tmp_path: Path) -> None:
    run(data, str(tmp_path / "out"), {"training.num_steps": 3})
    other = make_data(tmp_path, megabytes=0.06)
    if what == "tokens":
        info = json.loads((Path(data) / "train.json").read_text())
        assert info["sha256"] != json.loads((other / "train.json").read_text())["sha256"]
        copy_with_other_tokens(Path(data), other)
    said = "the training tokens' sha256" if what == "tokens" else "the tokenizer's sha256"
    with pytest.raises(UsageError, match=f"^resume: {said} must be '"):
        run(str(other), str(tmp_path / "out"), {"training.num_steps": 3})


def copy_with_other_tokens(data: Path, other: Path) -> None:
    """Make `other` the same tokenizer's tokens, of another text."""
    for name in ("tokenizer.json", "tokenizer.about.json", "train.npy", "train.json"):
        shutil.copy(data / name, other)
    for name in ("validation.npy", "validation.json"):
        shutil.copy(data / name, other / name.replace("validation", "train"))
        shutil.copy(data / name, other)
