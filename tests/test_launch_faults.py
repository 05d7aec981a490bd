"""Is the rank that fails or hangs named, with its trace, and do all ranks then end?"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launch_cases as cases
import pytest
from processes import PROMPT_S, is_running, wait_until

from cs336_systems.parallel.launch import RankFailedError, RankPool, RankTimeoutError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

SHORT_S = 4.0
"""Limit of calls that are meant to run into it."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two ranks of this module's own, which start again after each failure."""
    with RankPool(2, timeout_s=30) as own:
        yield own


@pytest.fixture(scope="module")
def hasty_ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=SHORT_S) as own:
        yield own


@contextlib.contextmanager
def ended_promptly(ranks: RankPool) -> Iterator[None]:
    """Assert that no rank of `ranks` is left soon after what happens inside."""
    pids = ranks.run(cases.pid)
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < PROMPT_S
    assert [pid for pid in pids if is_running(pid)] == []


# --- a rank fails ---


def test_raising_rank_is_named_with_its_trace(ranks: RankPool) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError) as caught:
        ranks.run(cases.raise_error)
    assert caught.value.rank == cases.FAULTY
    assert str(caught.value).startswith("rank 1 of 2: LookupError: nothing at 42\n")
    assert "in raise_error" in caught.value.traceback
    assert caught.value.traceback in str(caught.value)


def test_cause_is_preferred_to_what_others_felt_of_it_before(
    ranks: RankPool, tmp_path: Path
) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError, match="rank 1 of 2: LookupError"):
        ranks.run(cases.raise_after_the_other_felt_it, str(tmp_path))
    assert (tmp_path / "felt").exists()


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
    ],
)
def test_dying_rank_is_named(
    ranks: RankPool, function: Callable[..., object], arguments: list[int], words: str
) -> None:
    with ended_promptly(ranks), pytest.raises(RankFailedError) as caught:
        ranks.run(function, *arguments)
    assert str(caught.value).startswith(f"rank 1 of 2: {words}")


def test_rank_that_died_of_a_fault_shows_where_it_was(ranks: RankPool) -> None:
    with pytest.raises(RankFailedError, match="was killed by SIGSEGV") as caught:
        ranks.run(cases.kill_by, signal.SIGSEGV)
    assert "in kill_by" in caught.value.traceback


@pytest.mark.parametrize("code", [None, 3], ids=["raising", "exiting"])
def test_children_of_a_failed_rank_end_too(
    ranks: RankPool, tmp_path: Path, code: int | None
) -> None:
    with pytest.raises(RankFailedError, match=f"rank 1 of 2: .*{code or 42}"):
        ranks.run(cases.fail_leaving_a_child, str(tmp_path), code)
    (child,) = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_until(lambda: not is_running(child), PROMPT_S)


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
    # The group's limit is half of the call's, so a rank that waits in a collective gives up first.
    gave_up = "rank 0 meanwhile: RuntimeError: " in str(caught.value)
    assert gave_up == (function is not cases.hang_alone)


def test_rank_that_cannot_even_write_its_stack(hasty_ranks: RankPool) -> None:
    with ended_promptly(hasty_ranks), pytest.raises(RankTimeoutError) as caught:
        hasty_ranks.run(cases.stop)
    assert str(caught.value).endswith("stack of rank 1:\n(it wrote none)")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts tests in the background has them ignore interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_call_leaves_no_rank(ranks: RankPool) -> None:
    with ended_promptly(ranks):
        timer = threading.Timer(0.5, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(cases.hang_in_python)
        timer.join()


@pytest.mark.multigpu(2)
def test_hanging_rank_on_gpus_is_named_with_its_stack() -> None:
    with RankPool(2, backend="nccl", timeout_s=20) as own:
        with pytest.raises(RankTimeoutError, match="in hang_on_gpu"):
            own.run(cases.hang_on_gpu)
        assert [device for device, _ in own.run(cases.cuda_device)] == [0, 1]
