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
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336_systems.errors import bad

START = 64
"""What an item costs at its beginning and end, in rows."""
LAST_WAVES = 2
"""How many items a program the last heads have together, long ones first, to end at one time."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do: every head has the same items, one for each tile."""

    batch: int
    num_heads: int
    """Of a sequence."""
    together: int
    """How many heads after each other read the same memory."""
    costs: tuple[int, ...]
    """Of a head's items: how many rows of keys or queries each goes through."""

    @property
    def num_items(self) -> int:
        return self.batch * self.num_heads * len(self.costs)


@functools.cache
def schedule(work: Work, num_programs: int, at_once: int, device: torch.device) -> Tensor:
    """Return all items, int32 rows (tile, batch, head, the row that its program does next, that
    row's tile, batch and head, 0).

    Row i is program i's first; each of the rest goes to the program that is done first. After a
    program's last item comes the last row, whose tile is -1.

    at_once: how many programs run at a time.

    Kept for good, since recorded launches may read it at any time: 32 bytes an item.
    Raises: UsageError while a CUDA graph is captured, which cannot hold the copy to the device.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        rule = "have been run once before a CUDA graph is captured"
        raise bad("flash_attention_hopper", "shapes", rule, "new ones")
    rows: list[list[int]] = []
    last = [-1] * num_programs
    free = [(0, program) for program in range(num_programs)]
    for row, (tile, head) in enumerate(_in_order(work, at_once)):
        time, program = free[0]
        heapq.heapreplace(free, (time + work.costs[tile] + START, program))
        if last[program] >= 0:
            rows[last[program]][3] = row
        last[program] = row
        rows.append([tile, head // work.num_heads, head % work.num_heads, work.num_items])
    rows.append([-1, 0, 0, work.num_items])
    table = [[*row, *rows[row[3]][:3], 0] for row in rows]
    return torch.tensor(table, dtype=torch.int32).to(device)


def _in_order(work: Work, at_once: int) -> Iterator[tuple[int, int]]:
    """Yield (tile, head of all sequences).

    Heads that read the same memory come after those before them, so that what programs read at a
    time is little and stays in L2; of the last ones all items are in order, longest first.
    """
    tiles = sorted(range(len(work.costs)), key=lambda tile: -work.costs[tile])
    num_heads = work.batch * work.num_heads
    is_even = len(set(work.costs)) == 1
    at_last = 0 if is_even else math.ceil(LAST_WAVES * at_once / len(tiles))
    firsts = [*range(0, max(num_heads - at_last, 1), work.together), num_heads]
    for first, stop in itertools.pairwise(firsts):
        for tile in tiles:
            for head in range(first, stop):
                yield tile, head
