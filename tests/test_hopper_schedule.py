"""Who does what in the Hopper kernels: every item once, and nobody much longer than others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs336_systems.attention.hopper_schedule import START, Work, schedule
from cs336_systems.errors import UsageError

CPU = torch.device("cpu")
works = st.builds(
    Work,
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 6),
    together=st.integers(1, 3),
    costs=st.lists(st.integers(1, 2000), min_size=1, max_size=12).map(tuple),
)


def chains(work: Work, num_programs: int, at_once: int) -> list[list[tuple[int, int, int]]]:
    """Return what each program does: (tile, batch, head) in order."""
    rows = schedule(work, num_programs, at_once, CPU).tolist()
    assert len(rows) == work.num_items + 1
    found = []
    for row in range(num_programs):
        chain = []
        while rows[row][0] >= 0:
            tile, batch, head, row, *after = rows[row]
            assert after == [*rows[row][:3], 0]
            chain.append((tile, batch, head))
        found.append(chain)
    return found


def times(work: Work, num_programs: int) -> list[int]:
    """Return how long each of so many programs, all at once, works."""
    return [
        sum(work.costs[tile] + START for tile, _, _ in chain)
        for chain in chains(work, num_programs, num_programs)
    ]


@given(work=works, num_programs=st.integers(1, 40), at_once=st.integers(1, 40))
def test_every_item_is_done_once(work: Work, num_programs: int, at_once: int) -> None:
    num_programs = min(num_programs, work.num_items)
    done = [item for chain in chains(work, num_programs, at_once) for item in chain]
    assert len(done) == work.num_items
    assert set(done) == {
        (tile, batch, head)
        for tile in range(len(work.costs))
        for batch in range(work.batch)
        for head in range(work.num_heads)
    }


@given(work=works, num_programs=st.integers(1, 40))
def test_no_program_works_longer_than_the_bound_of_list_scheduling(
    work: Work, num_programs: int
) -> None:
    """Whoever ends last began its last item when nobody was free (Graham 1966)."""
    num_programs = min(num_programs, work.num_items)
    taken = times(work, num_programs)
    longest = max(work.costs) + START
    assert max(taken) <= sum(taken) / num_programs + longest * (1 - 1 / num_programs)


def test_causal_training_shapes_are_even() -> None:
    """8 x 16 heads of 2048 tokens in tiles of 128 on 132 multiprocessors: within 2 %."""
    costs = tuple(range(128, 2049, 128))
    work = Work(batch=8, num_heads=16, together=1, costs=costs)
    taken = times(work, 132)
    assert max(taken) < 1.02 * sum(taken) / len(taken)


def test_no_schedule_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work = Work(batch=1, num_heads=1, together=1, costs=(1, 2, 3))
    with pytest.raises(UsageError, match="shapes must have been run once before a CUDA graph"):
        schedule(work, 1, 1, torch.device("cuda"))


def test_heads_that_share_memory_come_after_each_other() -> None:
    """Where all items cost the same there is nothing to balance at the end."""
    work = Work(batch=2, num_heads=4, together=2, costs=(100, 100, 100))
    done = [(batch, head) for _, batch, head, *_ in schedule(work, 1, 8, CPU).tolist()[:-1]]
    pairs = [(batch, head // 2) for batch, head in done]
    assert pairs == sorted(pairs)
