"""Checks that every rank passes or that every rank fails, so that none is left waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.collectives import (
    Group,
    all_gather_into,
    all_gather_object,
    communication_device,
)

T = TypeVar("T")


def agreed(where: str, check: Callable[[], tuple[T, list[str]]], group: Group) -> T:
    """Return the first of what `check` returns if on all ranks it returns with equal lines.

    Cost: as `different`.
    Raises: what `check` raised; UsageError if it raised on another rank, or if the lines differ.
    """
    failure: Exception | None = None
    lines: list[str] = []
    try:
        result, lines = check()
    except Exception as error:
        failure = error
    reports = different(["" if failure is None else f"refused: {failure}", *lines], group)
    if failure is not None:
        raise failure
    if reports is None:
        return result
    for rank, (refusal, *_) in enumerate(reports):
        if refusal:
            raise UsageError(f"{where}: rank {rank} was {refusal}")
    raise bad(where, "arguments", "be the same on every rank", Difference(reports))


def different(lines: Sequence[str], group: Group) -> list[list[str]] | None:
    """Return all ranks' lines by rank, or None where they are equal.

    Cost: one all-gather of 32 bytes per rank; the lines themselves travel only if they differ.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=communication_device(group))
    every = mine.new_empty(dist.get_world_size(group) * mine.numel())
    all_gather_into(every, mine, group)
    if bool((every.view(-1, mine.numel()) == mine).all()):
        return None
    return all_gather_object(list(lines), group)


class Difference:
    """Shows the first line that differs, and which ranks say what."""

    def __init__(self, by_rank: Sequence[Sequence[str]]) -> None:
        rows = zip_longest(*by_rank, fillvalue="nothing more")
        self.row = next(row for row in rows if len(set(row)) > 1)

    def __repr__(self) -> str:
        found = [f"{line!r} on {self._ranks_with(line)}" for line in dict.fromkeys(self.row)]
        return " and ".join(found)

    def _ranks_with(self, line: str) -> str:
        ranks = [str(rank) for rank, other in enumerate(self.row) if other == line]
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
