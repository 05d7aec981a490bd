"""Interval arithmetic against a grid of unit cells, each of which is in a set or is not."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.measure.intervals import (
    Interval,
    coarser,
    duration,
    pack,
    union,
    unpack,
    waited,
    within,
    without,
)

SPAN = 24
MOMENT = st.integers(0, SPAN)
# Some are empty: a kernel may be shorter than the clock's tick.
INTERVALS = st.lists(st.tuples(MOMENT, MOMENT).map(lambda pair: (min(pair), max(pair))), max_size=8)


def cells(intervals: list[Interval]) -> set[int]:
    """Return the unit cells that some intervals cover."""
    return {cell for begin, end in intervals for cell in range(int(begin), int(end))}


def in_order(intervals: list[Interval]) -> bool:
    """Whether intervals are not empty, in order and do not touch."""
    return all(begin < end for begin, end in intervals) and all(
        before[1] < after[0] for before, after in pairwise(intervals)
    )


@given(INTERVALS)
@example([(0, 2), (2, 3)])
@example([(0, 9), (1, 2), (5, 5)])
def test_union_covers_the_same_cells(intervals: list[Interval]) -> None:
    merged = union(intervals)
    assert cells(merged) == cells(intervals)
    assert in_order(merged)
    assert duration(intervals) == len(cells(intervals))


@given(INTERVALS, INTERVALS)
@example([(0, 9)], [(2, 3), (5, 6)])
@example([(0, 2), (4, 6)], [(1, 5)])
def test_without_leaves_the_other_cells(intervals: list[Interval], others: list[Interval]) -> None:
    left = without(intervals, others)
    assert cells(left) == cells(intervals) - cells(others)
    assert in_order(left)


@given(INTERVALS, MOMENT, MOMENT)
def test_within_cuts_each_by_itself(intervals: list[Interval], first: int, second: int) -> None:
    window = (min(first, second), max(first, second))
    inside = within(intervals, window)
    assert cells(inside) == cells(intervals) & cells([window])
    assert len(inside) == sum(bool(cells([each]) & cells([window])) for each in intervals)


def waited_cells(working: set[int], awaited: list[Interval]) -> int:
    """Count, cell by cell, where work stood still for something that ended before it went on."""
    count = 0
    for cell in range(SPAN):
        if cell in working:
            continue
        begin = next((c + 1 for c in range(cell, -1, -1) if c in working), 0)
        end = next((c for c in range(cell, SPAN) if c in working), SPAN)
        ended = [each for each in awaited if begin < each[1] <= end]
        count += cell in cells(ended)
    return count


@given(INTERVALS, INTERVALS)
@example([(0, 4), (8, 9)], [(3, 7)])
@example([(0, 4), (8, 9)], [(3, 8)])
@example([(0, 4), (8, 9)], [(3, 9)])
def test_waits_are_for_what_ends_in_the_break(
    working: list[Interval], awaited: list[Interval]
) -> None:
    assert waited(working, awaited, (0, SPAN)) == waited_cells(cells(working), awaited)


def test_a_gather_that_goes_on_is_not_waited_for() -> None:
    assert waited([(0, 4), (8, 9)], [(3, 7)], (0, 9)) == 3
    assert waited([(0, 4), (8, 9)], [(3, 9)], (0, 9)) == 0


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), max_size=30), st.integers(1, 9))
@example([(0.1, 0.2), (0.3, 0.4), (0.7, 0.8)], 2)
def test_coarser_closes_the_shortest_breaks(drawn: list[Interval], most: int) -> None:
    intervals = union((min(pair), max(pair)) for pair in drawn)
    found = coarser(intervals, most)
    assert len(found) <= most
    assert without(intervals, found) == []
    breaks = [after[0] - before[1] for before, after in pairwise(intervals)]
    kept = [after[0] - before[1] for before, after in pairwise(found)]
    closed = len(breaks) - len(kept)
    assert kept == [each for each in breaks if closed == 0 or each > sorted(breaks)[closed - 1]]


@given(INTERVALS)
def test_text_holds_intervals(intervals: list[Interval]) -> None:
    assert unpack(pack(intervals)) == intervals


@pytest.mark.parametrize("text", ["1", "1:2:3", "a:b", "1:2,3:4"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        unpack(text)
