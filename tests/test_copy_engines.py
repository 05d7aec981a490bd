"""Averages by copies into the other ranks' memory: right to the bit, however late ranks are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import copy_engine_ranks as ranks_do
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import ON_RANKS
from processes import PROMPT_S
from ranks import pool

from cs336_systems.parallel.launch import RankFailedError, RankPool
from cs336_systems.parallel.peer_memory import after, has_come
from cs336_systems.parallel.peer_places import Place, find_problem

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
# Of runs: none, one element, fewer than ranks, some that ranks do not divide, some that are long.
SIZES = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 3000)), max_size=5)
# Of the memory: such that runs go in many pieces, some together, or all at once.
CAPACITIES = st.sampled_from([1, 2048, 5000, 2**20])
LIMIT_S = 6.0


def on_ranks(test: Callable[..., None]) -> Callable[..., None]:
    for mark in ON_RANKS:
        test = mark(test)
    return test


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
class TestOnTheCpu:
    pytestmark = ON_RANKS

    @example([1], torch.float32, 2**20)
    @example([], torch.float32, 2**20)
    @example([0, 0], torch.float32, 2**20)
    @example([3, 5, 2000, 1], torch.bfloat16, 2048)
    @example([3000], torch.float64, 1)
    @given(SIZES, DTYPES, CAPACITIES)
    def test_all_bits_are_right(
        self, world_size: int, sizes: list[int], dtype: torch.dtype, capacity: int
    ) -> None:
        for right in pool(world_size).run(ranks_do.average, sizes, dtype, capacity):
            assert all(right)

    @given(SIZES, CAPACITIES)
    @settings(max_examples=5)
    def test_ranks_that_are_late_change_nothing(
        self, world_size: int, sizes: list[int], capacity: int
    ) -> None:
        run = pool(world_size).run(
            ranks_do.average, sizes, torch.float32, capacity, num_calls=8, delayed_ms=5.0
        )
        assert all(map(all, run))

    def test_numbers_of_calls_begin_anew_after_the_last(self, world_size: int) -> None:
        run = pool(world_size).run(
            ranks_do.average, [700], torch.float32, 1024, first_sequence=2**32 - 4
        )
        assert all(map(all, run))


@pytest.mark.parametrize("mistake", ["averaged", "pushed"])
@on_ranks
def test_a_wait_left_out_is_seen(mistake: str) -> None:
    assert not all(pool(2).run(ranks_do.average_with, mistake)[0])


@on_ranks
def test_the_shared_file_has_no_name_once_it_is_in_use() -> None:
    assert pool(2).run(ranks_do.files_left) == [[], []]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("dtype", "copy_engines: dtype must be one of float32, float64, float16, bfloat16, "
         "got torch.int32"),
        ("strides", "copy_engines: runs must be contiguous, got (2,)"),
        ("exchange_mb", "flashddp_ce: exchange_mb must be positive and finite, got 0"),
        ("unequal", "wrap: module must be the same on every rank, got 'option exchange_mb=1' "
         "on rank 0 and 'option exchange_mb=2' on rank 1"),
        ("hosts", "flashddp_ce: ranks must be on one host, got 'host0 on rank 0; host1 on "
         "rank 1'"),
    ],
)  # fmt: skip
@on_ranks
def test_what_cannot_be_is_the_same_error_on_all_ranks(kind: str, text: str) -> None:
    assert pool(2).run(ranks_do.refused, kind) == [text, text]


@on_ranks
def test_a_full_disk_is_the_same_error_on_all_ranks() -> None:
    first, second = pool(2).run(ranks_do.refused, "disk")
    assert first == second
    assert first.startswith("flashddp_ce: rank 0 could not map ")
    assert first.endswith(" bytes of shared memory: OSError: [Errno 28] No space left on device")


@pytest.fixture(scope="module")
def mortals() -> Iterator[RankPool]:
    """Two ranks of this module's own, with a limit."""
    with RankPool(2, timeout_s=LIMIT_S) as own:
        yield own


@on_ranks
@pytest.mark.parametrize(
    ("fault", "rank", "text"),
    [
        ("dies", 1, "was killed by SIGKILL"),
        ("stays away", 0, "copy_engines: rank 1 must come within 3 s, got no signal"),
    ],
)
def test_a_rank_that_does_not_come_is_named(
    fault: str, rank: int, text: str, mortals: RankPool
) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailedError, match=f"rank {rank} of 2: .*{text}"):
        mortals.run(ranks_do.fail, fault)
    assert time.monotonic() - begin < PROMPT_S


# --- without ranks ---


ONE, TWO = (Place("here", gpu, frozenset({"a", "b"} - {gpu})) for gpu in ("a", "b"))


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([ONE, TWO], None),
        ([Place("here")] * 3, None),
        ([ONE], None),
        ([Place("here"), Place("there"), Place("here")],
         "x: ranks must be on one host, got 'here on ranks 0, 2; there on rank 1'"),
        ([ONE, ONE], "x: ranks must have a GPU each, got 'a on ranks 0, 1'"),
        ([ONE, Place("here", "b")], "x: GPUs must see and access each other's memory (peer "
         "access), got 'no access from rank 1 to rank 0'"),
        ([ONE, Place("here", "b", frozenset("a"), False)], "x: Python package cuda.bindings must "
         "be installed on every rank (pip install cuda-bindings), got 'none on rank 1'"),
    ],
)  # fmt: skip
def test_places_that_do_not_do(places: list[Place], text: str | None) -> None:
    problem = find_problem(places, "x")
    assert (None if problem is None else str(problem)) == text


@example(2**32 - 1, 1)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_numbers_are_compared_in_a_circle(sequence: int, steps: int) -> None:
    later = sequence
    for _ in range(steps):
        later = after(later)
    assert has_come(later, sequence)
    assert has_come(sequence, later) == (steps == 0)


@given(
    st.integers(1, 9000),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
    st.integers(2, 4),
    st.data(),
)
@settings(max_examples=12)
def test_the_kernel_averages_in_ranks_order(
    numel: int, dtype: torch.dtype, num_ranks: int, data: Any
) -> None:
    pytest.importorskip("triton")
    from cs336_systems.parallel.peer_average import average

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank = data.draw(st.integers(0, num_ranks - 1))
    by_rank = [ranks_do.runs_of(r, [numel], dtype, 0)[0].to(device) for r in range(num_ranks)]
    own = by_rank[rank].clone()
    inboxes = torch.zeros(num_ranks - 1, numel + 5, dtype=dtype, device=device)
    others = inboxes[:, :numel]
    others.copy_(torch.stack([run for r, run in enumerate(by_rank) if r != rank]))
    result = torch.zeros(numel + 1, dtype=dtype, device=device)
    average(own, others, result[:numel], rank)
    assert torch.equal(own, ranks_do.by_hand(by_rank))
    assert torch.equal(result[:numel], own)
    assert not result[numel:].any()


# --- on GPUs ---


@pytest.mark.multigpu(2)
@on_ranks
@example([1], torch.float32, 2**20)
@example([3, 5, 2000, 1], torch.bfloat16, 2048)
@example([2**20 + 7, 12345], torch.float32, 2**20)
@given(SIZES, DTYPES, CAPACITIES)
@settings(max_examples=10)
def test_the_bits_are_nccls(sizes: list[int], dtype: torch.dtype, capacity: int) -> None:
    run = pool(2, "nccl").run(
        ranks_do.average, sizes, dtype, capacity, delayed_ms=2.0, against_nccl=True
    )
    assert all(map(all, run))


@pytest.mark.multigpu(2)
@on_ranks
def test_numbers_of_calls_begin_anew_on_gpus() -> None:
    run = pool(2, "nccl").run(
        ranks_do.average, [700], torch.float32, 1024, first_sequence=2**32 - 4
    )
    assert all(map(all, run))
