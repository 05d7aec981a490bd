"""Saving beside training: what is saved is the moment, and a failure is not kept quiet."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_ranks import failing, same
from loop_runs import saved

from cs336_systems.parallel import checkpoint
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.saver import HostCopy, Saver

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with init_from_environment("gloo"):
        yield


def state_of(value: float) -> dict[str, Any]:
    return {
        "seconds": value,
        "model": {"weight": torch.full((3, 2), value).T, "none": torch.empty(0)},
        "optimizer": {0: {"step": 3, "moments": (torch.full((), value), None)}},
        "list": [torch.tensor([value]).double(), "text"],
    }


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path) -> None:
    """Writing waits until the state has been overwritten."""
    overwritten = threading.Event()
    real = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> None:
        assert overwritten.wait(10)
        real(*args, **kwargs)

    saver = Saver(tmp_path / "checkpoints", keep=2, device=CPU)
    state = state_of(1.0)
    with mock.patch.object(checkpoint, "save", save):
        saver.save(state, 1)
        state["model"]["weight"].fill_(9.0)
        state["list"][0].fill_(9.0)
        overwritten.set()
        saver.close()
    found, step = saved(tmp_path)
    wanted = state_of(1.0)
    del wanted["seconds"]
    assert step == 1
    assert same(found, wanted)


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    under_way: list[int] = []
    most = [0]
    real = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> None:
        under_way.append(1)
        most[0] = max(most[0], len(under_way))
        time.sleep(0.05)
        real(*args, **kwargs)
        under_way.pop()

    saver = Saver(tmp_path / "checkpoints", keep=9, device=CPU)
    with mock.patch.object(checkpoint, "save", save):
        for step in (1, 2, 3):
            saver.save(state_of(float(step)), step)
        saver.close()
    assert most == [1]
    found, step = saved(tmp_path)
    assert step == 3
    assert same(found["list"], [torch.tensor([3.0]).double(), "text"])


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_a_full_disk_is_raised_by_the_next_call(then: str, tmp_path: Path) -> None:
    saver = Saver(tmp_path / "checkpoints", keep=2, device=CPU)
    saver.save(state_of(1.0), 1)
    saver.wait()
    with failing("write", 0, 1, 99):
        saver.save(state_of(2.0), 2)
        saver._thread.join()  # type: ignore[union-attr]
    calls = {"save": lambda: saver.save(state_of(3.0), 3), "wait": saver.wait, "close": saver.close}
    said = r"^checkpoint: rank 0 could not save step 2: OSError: .*No space left on device$"
    with pytest.raises(CheckpointError, match=said):
        calls[then]()
    assert saved(tmp_path)[1] == 1
    assert not any((tmp_path / "checkpoints").glob(".unfinished-*"))
    saver.close()


def test_copies_use_the_same_memory_again() -> None:
    copier = HostCopy(pinned=False)
    first = copier.copy(state_of(1.0))
    second = copier.copy(state_of(2.0))
    assert same(second, state_of(2.0))
    assert first["model"]["weight"].data_ptr() == second["model"]["weight"].data_ptr()
    assert same(copier.copy({"model": torch.ones(9)}), {"model": torch.ones(9)})


def test_one_gigabyte_blocks_for_less_than_two_seconds(tmp_path: Path) -> None:
    """A tenth of it here, so a tenth of the time; CS336_SAVE_GB=1 takes all of it."""
    gigabytes = float(os.environ.get("CS336_SAVE_GB", "0.1"))
    tensors = {str(i): torch.ones(int(gigabytes * 1e9 / 4 / 16)) for i in range(16)}
    saver = Saver(tmp_path / "checkpoints", keep=1, device=CPU)
    begin = time.perf_counter()
    saver.save({"model": tensors}, 1)
    assert saver.blocked_seconds < 2 * gigabytes
    saver.wait()
    whole_s = time.perf_counter() - begin
    first_s = saver.blocked_seconds
    saver.save({"model": tensors}, 2)
    print(
        f"{gigabytes} GB: blocked {first_s:.3f} s, {saver.blocked_seconds:.3f} s the second time; "
        f"written after {whole_s:.2f} s"
    )
    assert saver.blocked_seconds < 2 * gigabytes
    saver.close()
