"""Sets of moments as sorted intervals: when something ran, and when something else did not."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

Interval = tuple[float, float]
"""Begin and end."""


def union(intervals: Iterable[Interval], *, gap: float = 0.0) -> list[Interval]:
    """Return the moments in any of some intervals, as intervals in order that do not touch.

    gap: breaks up to this long are closed, for a coarser and shorter list.
    """
    merged: list[Interval] = []
    for begin, end in sorted(each for each in intervals if each[1] > each[0]):
        if merged and begin - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def without(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """Return the moments in any of `intervals` and in none of `others`."""
    left: list[Interval] = []
    removed = union(others)
    first = 0
    for begin, end in union(intervals):
        while first < len(removed) and removed[first][1] <= begin:
            first += 1
        for other_begin, other_end in removed[first:]:
            if other_begin >= end:
                break
            if other_begin > begin:
                left.append((begin, other_begin))
            begin = max(begin, other_end)
        if begin < end:
            left.append((begin, end))
    return left


def within(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Return the parts of some intervals inside a window, each by itself."""
    begin, end = window
    cut = [(max(start, begin), min(stop, end)) for start, stop in intervals]
    return [each for each in cut if each[1] > each[0]]


def duration(intervals: Iterable[Interval]) -> float:
    """Return how long at least one of some intervals lasts."""
    return sum(end - begin for begin, end in union(intervals))


def waited(working: Iterable[Interval], awaited: Iterable[Interval], window: Interval) -> float:
    """Return how long work stood still for something that ended before the work went on.

    Of each break in `working`, the part covered by those of `awaited` that end within the break:
    one that runs on beyond it is not what the work waited for.
    """
    breaks = without([window], working)
    ends = sorted(awaited, key=lambda each: each[1])
    return sum(
        duration(within([each for each in ends if pause[0] < each[1] <= pause[1]], pause))
        for pause in breaks
    )


def coarser(intervals: Iterable[Interval], most: int) -> list[Interval]:
    """Return at most `most` intervals, the shortest breaks closed."""
    merged = union(intervals)
    if len(merged) <= most:
        return merged
    breaks = sorted(after[0] - before[1] for before, after in pairwise(merged))
    return union(merged, gap=breaks[len(merged) - most - 1])


def pack(intervals: Iterable[Interval]) -> str:
    """Return intervals as text, begin and end of each joined by a colon: a list of numbers would
    take a line of JSON for each."""
    return " ".join(f"{begin:.3f}:{end:.3f}" for begin, end in intervals)


def unpack(text: str) -> list[Interval]:
    """Return the intervals that `pack` wrote.

    Raises: ValueError for other text.
    """
    pairs = (word.split(":") for word in text.split())
    return [(float(begin), float(end)) for begin, end in pairs]
