"""Averages over the ranks of one host by copies into each other's memory.

NCCL's kernels hold multiprocessors for as long as a message takes, and products that fill a GPU in
one wave then take two. Copies between GPUs need none:

1. Every rank is responsible for one part of each run. It pushes what it has of the others' parts
   into their inboxes, and signals PUSHED.
2. When all have, it averages its own part, into the run and its result, and signals AVERAGED.
3. When all have, it pulls the others' results into the run.

A rank's memory is `world_size` places of equal size: its result, then an inbox for each peer. One
is enough, for it is not overwritten before it was read: a rank pushes again only after step 3,
thus after its peers' AVERAGED, by which they have read their inboxes; and a rank writes its result
again only after its peers' next PUSHED, which they signal after they have pulled the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.errors import bad
from cs336_systems.parallel.collectives import Group, announce
from cs336_systems.parallel.peer_memory import (
    AVERAGED,
    PUSHED,
    PeerMemory,
    after,
    open_peer_memory,
)
from cs336_systems.parallel.peer_places import check_places

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Parts begin at multiples of it, so that kernels may load them in whole vectors.
_ALIGNMENT_BYTES = 16
# Places do at multiples of this.
_PLACE_BYTES = 256
_RESULT = 0  # The place of a rank's own average; the inboxes follow.


class _Piece(NamedTuple):
    """A run, or as much of one as fits, cut into one part for each rank."""

    parts: list[Tensor]
    """The last ones may be shorter than the first, or empty."""
    offset: int
    """Bytes from the beginning of a place to where a part of it lies."""


class CopyEngines:
    """Average runs of memory over the ranks of a group, all of them on one host.

    capacity_bytes: of the memory that each rank gives to it; longer runs go in pieces.
    where: who is at fault in errors.
    Shapes: the memory is (world_size, place): result and world_size - 1 inboxes.
    Raises: UsageError with the same text on all ranks where they cannot reach each other.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        capacity_bytes: int,
        *,
        where: str = "copy_engines",
    ) -> None:
        self._group, self._where = group, where
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._peers = [peer for peer in range(self._world_size) if peer != self._rank]
        self._place_bytes = _round_up(-(-capacity_bytes // self._world_size), _PLACE_BYTES)
        self._sequence = 0
        self._memory: PeerMemory | None = None
        if self._peers:
            check_places(group, device, where)
            num_bytes = self._place_bytes * self._world_size
            self._memory = open_peer_memory(group, device, num_bytes, where=where)

    @torch.no_grad()
    def average_(self, runs: Sequence[Tensor]) -> None:
        """Average each run over the ranks, in place; every rank has the same bits.

        On a GPU the work is queued on the current stream. Runs must have the same sizes and dtypes
        on all ranks, which is not checked.
        Raises: UsageError for a run with gaps or of another dtype; LateRankError, on the CPU.
        """
        for run in runs:
            if run.dtype not in DTYPES:
                raise bad(self._where, "dtype", f"be one of {_named(DTYPES)}", run.dtype)
            if not run.is_contiguous():
                raise bad(self._where, "runs", "be contiguous", run.stride())
        announce("all_reduce", runs, self._group)
        if not self._peers:
            return
        pieces: list[_Piece] = []
        used = 0
        for run in runs:
            flat = run.view(-1)
            most = self._place_bytes * self._world_size // flat.itemsize
            for part in flat.split(most) if flat.numel() else ():
                size = self._part_numel(part) * part.itemsize
                if used + size > self._place_bytes:
                    self._average(pieces)
                    pieces, used = [], 0
                pieces.append(self._cut(part, used))
                used += size
        if pieces:
            self._average(pieces)

    def _cut(self, run: Tensor, offset: int) -> _Piece:
        numel = self._part_numel(run)
        parts = [run[rank * numel : (rank + 1) * numel] for rank in range(self._world_size)]
        return _Piece(parts, offset)

    def _part_numel(self, run: Tensor) -> int:
        """Return how many elements the first ranks' parts have."""
        return _round_up(-(-run.numel() // self._world_size), _ALIGNMENT_BYTES // run.itemsize)

    def _average(self, pieces: Sequence[_Piece]) -> None:
        """Average what fits into a place at once."""
        assert self._memory is not None
        self._sequence = after(self._sequence)
        to_peers = [
            (peer, piece.parts[peer], piece.offset)
            for piece in pieces
            for peer in self._peers
            if piece.parts[peer].numel()
        ]
        for peer, part, offset in to_peers:
            self._at(peer, self._inbox(peer), offset, part).copy_(part)
        self._memory.signal(PUSHED, self._sequence)
        self._memory.wait(PUSHED, self._sequence)
        for parts, offset in pieces:
            own = parts[self._rank]
            if own.numel():
                result = self._at(self._rank, _RESULT, offset, own)
                self._memory.average(own, self._others(offset, own), result)
        self._memory.signal(AVERAGED, self._sequence)
        self._memory.wait(AVERAGED, self._sequence)
        for peer, part, offset in to_peers:
            part.copy_(self._at(peer, _RESULT, offset, part))

    def _inbox(self, owner: int) -> int:
        """Return the place in `owner`'s memory for what this rank has: by rank, behind the result,
        and without one for the owner itself."""
        return _RESULT + 1 + (self._rank if self._rank < owner else self._rank - 1)

    def _at(self, owner: int, place: int, offset: int, part: Tensor) -> Tensor:
        """Return where in `owner`'s memory a part lies."""
        assert self._memory is not None
        begin = place * self._place_bytes + offset
        return self._memory.view(owner, begin, part.numel(), part.dtype)

    def _others(self, offset: int, own: Tensor) -> Tensor:
        """Return what the peers have pushed of this rank's part, by rank.

        Shapes: (world_size - 1, numel), one row in each inbox.
        """
        assert self._memory is not None
        stride = self._place_bytes // own.itemsize
        num_peers, numel = len(self._peers), own.numel()
        begin = (_RESULT + 1) * self._place_bytes + offset
        spanned = (num_peers - 1) * stride + numel
        inboxes = self._memory.view(self._rank, begin, spanned, own.dtype)
        return inboxes.as_strided((num_peers, numel), (stride, 1))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _named(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
