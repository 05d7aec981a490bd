"""Which program does which items of work, and in what order.

Under a causal mask items cost from one tile to a hundred. A program for each leaves that to the
GPU, which gives the next one to whoever is free, but then nothing of an item can begin before the
last one has ended. Programs that do several items in turn can overlap them and have to be told
which; dealing items out evenly by number does not deal out work evenly. So the GPU's own rule is
played through beforehand, once for each shape, with what items cost.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

START = 64
"""What an item costs at its beginning and end, in rows."""


def items(num_ranks: int, num_heads: int, section: int) -> Iterator[int]:
    """Yield the rank of each item in order: of `section` heads all tiles of a rank, then the next.

    `hopper_common.locate` is the inverse, on the device.
    """
    for first in range(0, num_heads, section):
        for rank in range(num_ranks):
            for _ in range(min(section, num_heads - first)):
                yield rank


@functools.cache
def following(
    costs: tuple[int, ...], num_heads: int, section: int, num_programs: int, device: torch.device
) -> Tensor:
    """Return for each item (int32) the one that its program does next, or -1.

    Item i < num_programs is program i's first; each of the rest goes to the program that is done
    first. Kept for good, since kernels that were recorded may read it at any time: 4 bytes an item.

    costs: of a head's items by rank, longest first: rows of keys or queries to go through.
    num_heads: of all sequences together.
    section: how many heads are worked on at a time.
    """
    last = list(range(num_programs))
    free = [(0, program) for program in last]
    after: list[int] = []
    for item, rank in enumerate(items(len(costs), num_heads, section)):
        time, program = free[0]
        heapq.heapreplace(free, (time + costs[rank] + START, program))
        after.append(-1)
        if item >= num_programs:
            after[last[program]] = item
            last[program] = item
    return torch.tensor(after, dtype=torch.int32).to(device)
