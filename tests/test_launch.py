"""Do arguments and results travel as promised, and do pools keep to themselves?"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import launch_cases as cases
import pytest
import torch
from hypothesis import example, given
from processes import PROMPT_S, is_running, wait_until
from ranks import pool

from cs336_systems.errors import UsageError
from cs336_systems.parallel import rank_handle
from cs336_systems.parallel.launch import RankFailedError, RankPool, run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two ranks of this module's own, which start again after each failure."""
    with RankPool(2, timeout_s=30) as own:
        yield own


# --- what comes back ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_by_rank(world_size: int) -> None:
    total = 0.5 * 3.0 * world_size * (world_size + 1) / 2
    expected = [(rank, world_size, total) for rank in range(world_size)]
    assert pool(world_size).run(cases.rank_and_sum, 3.0, factor=0.5) == expected


def test_fresh_ranks_for_one_call() -> None:
    first, second = run_on_ranks(cases.rank_and_sum, 2, 1.0, factor=2.0, timeout_s=30)
    assert (first, second) == ((0, 2, 6.0), (1, 2, 6.0))


@example(shape=(), dtype=torch.bfloat16, is_view=False, seed=0)
@example(shape=(0, 3), dtype=torch.float32, is_view=True, seed=0)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
    is_view=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_tensors_travel_by_value(
    shape: tuple[int, ...], dtype: torch.dtype, is_view: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(-9, 9, shape, generator=generator).to(dtype)
    if is_view:
        tensor = tensor.T if tensor.ndim == 2 else tensor.expand(2, *shape).clone()[1]
    before = tensor.clone()
    results = pool(2).run(cases.add_rank_in_place, {"x": tensor})
    assert torch.equal(tensor, before)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["x"], before + rank, rtol=0, atol=0)
        assert result["x"].stride() == tensor.stride()


def test_tensors_that_share_memory_do_so_in_the_rank_and_in_the_result() -> None:
    shared = torch.zeros(4)
    for rank, result in enumerate(
        pool(2).run(cases.add_rank_in_place, {"all": shared, "half": shared[2:]})
    ):
        assert result["all"].tolist() == [rank, rank, 2 * rank, 2 * rank]
        assert result["half"].data_ptr() == result["all"][2:].data_ptr()


def test_large_arguments_and_results(ranks: RankPool) -> None:
    large = torch.arange(2_000_000)
    for rank, result in enumerate(ranks.run(cases.add_rank_in_place, {"x": large})):
        assert torch.equal(result["x"], large + rank)


def test_ranks_take_nothing_over_from_pytest(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
    ranks.close()
    expected = {"modules": [], "variables": [], "num_threads": 1, "backend": "gloo", "argv": "-c"}
    assert ranks.run(cases.surroundings) == [expected, expected]


# --- pools ---


def test_same_ranks_serve_many_calls(ranks: RankPool) -> None:
    # 200 calls take 0.6 s on two busy cores, against 1.5 s for one start of two ranks.
    before = ranks.run(cases.pid)
    for number in range(200):
        assert ranks.run(cases.rank_and_sum, number)[1] == (1, 2, 3.0 * number)
    assert ranks.run(cases.pid) == before


def test_pools_do_not_meet(ranks: RankPool) -> None:
    with RankPool(2, timeout_s=30) as other:
        pids = {*other.run(cases.pid), *ranks.run(cases.pid)}
        assert len(pids) == 4
        with ThreadPoolExecutor(2) as threads:
            calls = [
                threads.submit(each.run, cases.rank_and_sum, number)
                for each, number in ((other, 1.0), (ranks, 5.0))
            ]
        assert [call.result()[0] for call in calls] == [(0, 2, 3.0), (0, 2, 15.0)]
        assert {*other.run(cases.pid), *ranks.run(cases.pid)} == pids


def test_shared_pool_is_one_for_each_size() -> None:
    assert pool(2) is pool(2)
    assert pool(2) is not pool(3)


def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RankPool(2, timeout_s=30) as own:
        own.run(cases.pid)
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(RankFailedError):
            own.run(cases.exit_process, 3)
        assert list(tmp_path.iterdir()) == []
        own.run(cases.pid)
    assert list(tmp_path.iterdir()) == []


# --- mistakes of the caller ---


@pytest.mark.parametrize(
    ("world_size", "options", "words"),
    [
        (0, {}, "RankPool: world_size must be at least 1, got 0"),
        (2, {"backend": "mpi"}, "RankPool: backend must be one of gloo, nccl, got 'mpi'"),
        (2, {"timeout_s": 0}, "RankPool: timeout_s must be positive, got 0"),
        (99, {"backend": "nccl"}, r"world_size must be at most the \d+ CUDA devices here, got 99"),
    ],
)
def test_wrong_arguments(world_size: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RankPool(world_size, **options)


def test_function_must_have_a_name_of_its_own(ranks: RankPool) -> None:
    before = ranks.run(cases.pid)
    with pytest.raises(UsageError, match="function must be found at the top of a module"):
        ranks.run(lambda: None)
    assert ranks.run(cases.pid) == before


# --- GPUs ---


@pytest.mark.multigpu(2)
def test_each_rank_has_its_own_gpu() -> None:
    for rank, (device, total) in enumerate(pool(2, "nccl").run(cases.cuda_device)):
        assert device == rank
        assert total.device == torch.device("cpu")
        assert total.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.gpu
def test_a_single_rank_on_a_gpu() -> None:
    assert run_on_ranks(cases.cuda_device, 1, backend="nccl")[0][0] == 0


# --- how they start ---

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")


@ON_LINUX
def test_ranks_are_forks_of_one_process_until_the_environment_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RankPool(2, timeout_s=30) as first, RankPool(1, timeout_s=30) as second:
        parents = {*first.run(os.getppid), *second.run(os.getppid)}
        assert len(parents) == 1
        assert os.getpid() not in parents
        for number in range(3):
            monkeypatch.setenv("CS336_NUMBER", str(number))
            with RankPool(1, timeout_s=30) as other:
                assert other.run(os.getenv, "CS336_NUMBER") == [str(number)]
                assert parents.isdisjoint(other.run(os.getppid))
        # Theirs is asked for no more ranks by now, and still looks after those it has.
        assert first.run(os.getenv, "CS336_NUMBER") == [None, None]
        with pytest.raises(RankFailedError, match="exited with code 3 without an answer"):
            first.run(cases.exit_process, 3)


@ON_LINUX
def test_ranks_end_with_the_process_that_looks_after_them_and_others_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Another environment has another one: that of this process' other pools must live on.
    monkeypatch.setenv("CS336_NUMBER", "of its own")
    with RankPool(2, timeout_s=30) as own:
        before = own.run(cases.pid)
        os.kill(own.run(os.getppid)[0], signal.SIGKILL)
        with pytest.raises(RankFailedError, match="was killed by SIGKILL"):
            own.run(time.sleep, 20)
        assert wait_until(lambda: not any(map(is_running, before)), PROMPT_S)
        assert set(own.run(cases.pid)).isdisjoint(before)


@pytest.mark.parametrize("how", ["forked", "anew"])
def test_ranks_are_where_their_parent_is(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "anew":
        monkeypatch.setattr(rank_handle, "fork_rank", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with RankPool(1, timeout_s=30) as own:
        assert own.run(os.getcwd) == [str(tmp_path)]
        own.run(print, "said by a rank")
        assert own.run(os.getpgrp) == own.run(os.getpid)
        is_child = own.run(os.getppid) == [os.getpid()]
    assert is_child == (how == "anew" or sys.platform != "linux")
    assert "said by a rank" in capfd.readouterr().out
