"""Do calls to ranks return, raise or time out as promised, whatever happens in a rank?"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import launch_cases as cases
import pytest
import torch
from hypothesis import example, given
from ranks import pool

from cs336_systems.errors import UsageError
from cs336_systems.parallel.launch import (
    RankFailedError,
    RankPool,
    RankTimeoutError,
    run_on_ranks,
)

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

PROMPT_S = 10.0
"""Within this, all ranks of a failed call have ended."""
SHORT_S = 4.0
"""Limit of calls that are meant to run into it."""


@contextlib.contextmanager
def ended_promptly(ranks: RankPool) -> Iterator[None]:
    """Assert that no rank of `ranks` is left soon after what happens inside."""
    pids = ranks.run(cases.pid)
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < PROMPT_S
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two ranks of this module's own, which start again after each failure."""
    with RankPool(2, timeout_s=30) as own:
        yield own


@pytest.fixture(scope="module")
def hasty_ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=SHORT_S) as own:
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
        assert result["x"].stride() == before.as_strided_(tensor.shape, tensor.stride()).stride()


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


# --- a rank fails ---


def test_raising_rank_is_named_with_its_trace(ranks: RankPool) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError) as caught:
        ranks.run(cases.raise_error)
    assert caught.value.rank == cases.FAULTY
    assert str(caught.value).startswith("rank 1 of 2: LookupError: nothing at 42\n")
    assert "in raise_error" in caught.value.traceback
    assert caught.value.traceback in str(caught.value)


def test_cause_is_preferred_to_what_others_felt_of_it_before(ranks: RankPool) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError, match="rank 1 of 2: LookupError"):
        ranks.run(cases.raise_after_the_others_felt_it)


def test_earliest_cause_is_preferred(ranks: RankPool) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError, match="rank 1 of 2: LookupError"):
        ranks.run(cases.raise_everywhere)


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (cases.exit_python, [5], "SystemExit: 5"),
        (cases.exit_process, [3], "exited with code 3 without an answer"),
        (cases.exit_process, [0], "exited with code 0 without an answer"),
        (cases.kill_by, [signal.SIGKILL], "was killed by SIGKILL"),
        (cases.kill_by, [signal.SIGSEGV], "was killed by SIGSEGV"),
        (cases.die_leaving_a_child_that_holds_the_pipe, [], "exited with code 3"),
    ],
)
def test_dying_rank_is_named(
    ranks: RankPool, function: Callable[..., object], arguments: list[int], words: str
) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError) as caught:
        ranks.run(function, *arguments)
    assert str(caught.value).startswith(f"rank 1 of 2: {words}")


def test_rank_killed_by_a_fault_shows_where_it_was(ranks: RankPool) -> None:
    with pytest.raises(RankFailedError) as caught:
        ranks.run(cases.kill_by, signal.SIGSEGV)
    assert "in kill_by" in caught.value.traceback


def test_rank_that_died_between_calls_is_named(ranks: RankPool) -> None:
    os.kill(ranks.run(cases.pid)[0], signal.SIGKILL)
    with pytest.raises(RankFailedError, match="rank 0 of 2: was killed by SIGKILL"):
        ranks.run(cases.pid)


def test_mismatched_collective_ends_in_an_error_that_shows_it(ranks: RankPool) -> None:
    # gloo aborts one of the ranks and the other sees its connection closed.
    with ended_promptly(ranks), pytest.raises(RankFailedError) as caught:
        ranks.run(cases.reduce_unequal_sizes)
    assert "in reduce_unequal_sizes" in caught.value.traceback


def test_result_that_cannot_be_pickled_is_the_ranks_failure(ranks: RankPool) -> None:
    with pytest.raises(RankFailedError, match=r"rank [01] of 2: .*lambda"):
        ranks.run(cases.return_what_cannot_be_pickled)


def test_next_call_has_fresh_ranks(ranks: RankPool) -> None:
    before = ranks.run(cases.pid)
    with pytest.raises(RankFailedError):
        ranks.run(cases.raise_error)
    assert set(ranks.run(cases.pid)).isdisjoint(before)
    assert ranks.run(cases.rank_and_sum, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]


# --- a rank hangs ---


@pytest.mark.parametrize(
    "function", [cases.hang_in_python, cases.hang_alone, cases.hang_holding_the_interpreter]
)
def test_hanging_rank_is_named_with_its_stack(
    hasty_ranks: RankPool, function: Callable[[], None]
) -> None:
    with ended_promptly(hasty_ranks), pytest.raises(RankTimeoutError) as caught:
        hasty_ranks.run(function)
    assert caught.value.ranks == [cases.FAULTY]
    _, stack = str(caught.value).split("stack of rank 1:")
    assert f"in {function.__name__}" in stack


def test_what_the_others_felt_of_a_hanging_rank_is_said(hasty_ranks: RankPool) -> None:
    # The group's limit is half of the call's, so the waiting rank gives up first.
    with pytest.raises(RankTimeoutError, match="rank 0 meanwhile: RuntimeError: .*Timed out"):
        hasty_ranks.run(cases.hang_in_python)


def test_rank_that_cannot_even_write_its_stack(hasty_ranks: RankPool) -> None:
    with ended_promptly(hasty_ranks), pytest.raises(RankTimeoutError) as caught:
        hasty_ranks.run(cases.stop)
    assert str(caught.value).endswith("stack of rank 1:\n(it wrote none)")


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
        threads = [
            threading.Thread(target=each.run, args=(cases.rank_and_sum, 1.0))
            for each in (other, ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(pids) == 4
        assert other.run(cases.rank_and_sum, 5.0)[0] == (0, 2, 15.0)
        assert {*other.run(cases.pid), *ranks.run(cases.pid)} == pids


def test_shared_pool_is_one_for_each_size() -> None:
    assert pool(2) is pool(2)
    assert pool(2) is not pool(3)


def test_interrupted_call_leaves_no_rank(ranks: RankPool) -> None:
    with ended_promptly(ranks):
        timer = threading.Timer(0.5, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(cases.hang_in_python)
        timer.join()


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


# --- whole programs ---

SCRIPT = """\
import sys
import torch.distributed as dist
from cs336_systems.parallel.launch import run_on_ranks

def double(x):
    return x * (dist.get_rank() + 1)

{guard}
    print(run_on_ranks(double, 2, 21))
"""


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which this checkout and its tests' modules are found."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).parent
    return {**names, "PYTHONPATH": f"{tests.parent}:{tests}", **variables}


@pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]])
def test_functions_of_a_program_and_no_warning_on_the_way(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "program.py").write_text(SCRIPT.format(guard='if __name__ == "__main__":'))
    done = run_python("-W", "error", *arguments, folder=tmp_path)
    assert (done.stdout, done.stderr) == ("[21, 42]\n", "")


def test_program_that_would_start_itself_over_and_over_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT.format(guard="if True:"))
    done = run_python("program.py", folder=tmp_path)
    assert done.returncode == 1
    assert "UsageError: RankPool: run must be called under `if __name__" in done.stderr


def test_program_without_a_file_is_refused(tmp_path: Path) -> None:
    done = run_python("-c", SCRIPT.format(guard="if True:"), folder=tmp_path)
    assert "function must be in a module that ranks can import, got '__main__'" in done.stderr


@pytest.mark.parametrize("method", ["write_pid", "write_pid_and_sleep"], ids=["idle", "busy"])
def test_no_rank_outlives_a_killed_parent(tmp_path: Path, method: str) -> None:
    pids, temporary = tmp_path / "pids", tmp_path / "temporary"
    pids.mkdir()
    temporary.mkdir()
    program = (
        "import sys, time, launch_cases as cases\n"
        "from cs336_systems.parallel.launch import RankPool\n"
        f"RankPool(2).run(cases.{method}, sys.argv[1])\n"
    )
    keep = "pool = RankPool(2); pool.run(cases.write_pid, sys.argv[1]); time.sleep(60)"
    if method == "write_pid":
        program = program.replace("RankPool(2).run(cases.write_pid, sys.argv[1])", keep)
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(pids)], env=environment(TMPDIR=str(temporary))
    )
    with contextlib.closing(_Killed(parent)):
        assert wait_until(lambda: len(list(pids.iterdir())) == 2, 60)
        started = [int(path.name) for path in pids.iterdir()]
        assert [pid for pid in started if not is_running(pid)] == []
    assert wait_until(lambda: not any(is_running(pid) for pid in started), PROMPT_S)
    assert list(temporary.iterdir()) == []


class _Killed:
    """Kills a process at the end, also after a failed assertion."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_two_test_runs_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_sum.py").write_text(
        "import launch_cases as cases\n"
        "from ranks import pool\n\n"
        "def test_sum():\n"
        "    for _ in range(50):\n"
        "        assert pool(2).run(cases.rank_and_sum, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    runs = [
        subprocess.Popen(
            [*command, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=100)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs


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


@pytest.mark.multigpu(2)
def test_hanging_rank_on_gpus_is_named_with_its_stack() -> None:
    with RankPool(2, backend="nccl", timeout_s=20) as own:
        with pytest.raises(RankTimeoutError, match="in hang_on_gpu"):
            own.run(cases.hang_on_gpu)
        assert [device for device, _ in own.run(cases.cuda_device)] == [0, 1]
