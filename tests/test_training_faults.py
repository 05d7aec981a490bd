"""A rank that fails amid training: it is named, all end soon, and training resumes from the last
checkpoint, whatever the strategy."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import training_ranks
from processes import PROMPT_S, is_running

from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.launch import RankFailedError, RankPool, RankTimeoutError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks"), pytest.mark.slow]

OURS = [name for name, entry in STRATEGIES.items() if not entry.peer]
# Each takes two starts of ranks: the slower faults for those with the most under way at once.
CASES = [(strategy, "dies") for strategy in OURS]
CASES += [
    (strategy, fault)
    for strategy in ("flashddp", "flashddp_ce", "zero1", "fsdp")
    for fault in ("raises", "hangs")
]
LIMIT_S = 6.0
"""Of a call in which a rank hangs; half of it for a collective."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two ranks of this module's own; the call after a fault starts those of the next test."""
    with RankPool(2, timeout_s=LIMIT_S, on_start=training_ranks.prepare) as own:
        yield own


@pytest.mark.parametrize(("strategy", "fault"), CASES)
def test_a_rank_that_fails_in_the_backward_pass(
    ranks: RankPool, strategy: str, fault: str, tmp_path: Path
) -> None:
    pids = ranks.run(os.getpid)
    begin = time.monotonic()
    if fault == "hangs":
        with pytest.raises(RankTimeoutError) as timeout:
            ranks.run(training_ranks.fail_in_backward, strategy, str(tmp_path), fault)
        assert timeout.value.ranks == [training_ranks.FAULTY]
        assert "in _hang" in str(timeout.value)
    else:
        with pytest.raises(RankFailedError) as failure:
            ranks.run(training_ranks.fail_in_backward, strategy, str(tmp_path), fault)
        cause = "was killed by SIGKILL" if fault == "dies" else "LookupError: nothing at 42"
        assert str(failure.value).startswith(f"rank 1 of 2: {cause}\n")
    assert time.monotonic() - begin < PROMPT_S
    assert [pid for pid in pids if is_running(pid)] == []

    assert set(ranks.run(os.getpid)).isdisjoint(pids)
    assert ranks.run(training_ranks.resumes_bitwise, strategy, str(tmp_path)) == [True, True]


@pytest.mark.parametrize("strategy", ["flashddp", "flashddp_ce", "fsdp"])
def test_a_rank_with_more_steps_than_others_ends_too(ranks: RankPool, strategy: str) -> None:
    """It waits no longer than the group's limit, and what it waited for is in the trace."""
    pids = ranks.run(os.getpid)
    begin = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 0 of 2: ") as caught:
        ranks.run(training_ranks.train_uneven, strategy)
    assert time.monotonic() - begin < PROMPT_S
    assert "in train_uneven" in caught.value.traceback
    words = ("gloo", "Application timeout", "rank 1 must come within 3 s, got no signal")
    assert any(each in str(caught.value) for each in words)
    assert [pid for pid in pids if is_running(pid)] == []
