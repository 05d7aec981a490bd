"""Which rank owns which parameter: the same answer on every rank, without a message."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Return the rank that gets each of `sizes`: largest first, to the rank that holds least.

    `loads` is what each rank holds already. Ties go to the earlier size and to the lower rank.
    Starting from nothing, no rank gets more than the mean plus the largest size.
    Cost: O(n log n) for n sizes.
    Source: Graham, "Bounds on multiprocessing timing anomalies", section on longest-first lists.
    """
    ranks = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(ranks)
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, owner = ranks[0]
        owners[index] = owner
        heapq.heapreplace(ranks, (load + sizes[index], owner))
    return owners
