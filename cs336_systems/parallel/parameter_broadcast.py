"""Owners send their parameters to all ranks: few messages, in place, waited for only at need.

The parameters of one owner and dtype become views of one flat buffer, so that a message is a slice
of memory in which the optimizer has just written and from which the next forward pass reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.errors import bad
from cs336_systems.parallel.collectives import Group, broadcast

# Every parameter starts at a multiple of it, as a fresh allocation does for every kernel's sake.
_ALIGNMENT_BYTES = 256


@dataclass(eq=False)
class Chunk:
    """One message: neighbouring parameters of one owner, and the slice of memory they share."""

    owner: int
    first: int
    """Where its first parameter stands among all parameters: chunks are sent in this order."""
    params: list[Tensor] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    work: dist.Work | None = None


class ParameterBroadcast:
    """Keeps parameters equal on all ranks of `group` after their owners changed them."""

    def __init__(self, group: Group, *, chunk_bytes: int | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.chunk_bytes = chunk_bytes
        self.chunks: list[Chunk] = []
        self._pending: dict[Tensor, Chunk] = {}
        self._num_params = 0

    @property
    def pending(self) -> bool:
        """Whether parameters may still be on their way."""
        return bool(self._pending)

    def add(self, params: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Lay out `params`, in the order in which the model uses them, in buffers of their owners.

        Cost: beyond the parameters themselves, at most one buffer at a time.
        """
        runs = defaultdict(list)
        for index, (param, owner) in enumerate(zip(params, owners, strict=True)):
            runs[owner, param.dtype, param.device].append((index + self._num_params, param))
        for (owner, _, _), run in runs.items():
            laid_out = _lay_out(owner, run, self.chunk_bytes)
            self.chunks += [chunk for chunk in laid_out if chunk.flat.numel() > 0]
        self._num_params += len(params)
        self.chunks.sort(key=lambda chunk: chunk.first)

    @torch.no_grad()
    def start(self) -> None:
        """Send every chunk on its way, asynchronously; `wait` before reading a parameter."""
        for chunk in self.chunks:
            moved = _moved(chunk)
            if chunk.owner == self.rank:
                for param, view in moved:
                    view.copy_(param)
            else:
                # Autograd must see that these changed, as it does on the owner.
                torch.autograd.graph.increment_version(chunk.params)
            chunk.work = broadcast(chunk.flat, self.group, source=chunk.owner, async_op=True)
            self._pending.update(dict.fromkeys(chunk.params, chunk))

    @torch.no_grad()
    def wait(self, params: Iterable[Tensor] | None = None) -> None:
        """Have the current stream wait until `params` (all of them when None) are up to date."""
        if not self._pending:
            return
        for param in list(self._pending) if params is None else params:
            if (chunk := self._pending.get(param)) is not None:
                self._finish(chunk)

    def _finish(self, chunk: Chunk) -> None:
        for param in chunk.params:
            del self._pending[param]
        if chunk.work is not None:
            chunk.work.wait()
            chunk.work = None
        if chunk.owner != self.rank:
            for param, view in _moved(chunk):
                param.copy_(view)


def _lay_out(owner: int, run: list[tuple[int, Tensor]], chunk_bytes: int | None) -> list[Chunk]:
    """Put parameters of one owner, dtype and device into one buffer, cut into chunks."""
    sizes = [_padded_numel(param) for _, param in run]
    flat = run[0][1].new_zeros(sum(sizes))
    chunks: list[Chunk] = []
    start = begin = 0
    for (index, param), size in zip(run, sizes, strict=True):
        full = (
            chunk_bytes is not None and (start + size - begin) * flat.element_size() > chunk_bytes
        )
        if not chunks or (full and start > begin):
            chunks.append(Chunk(owner, index))
            begin = start
        view = flat[start : start + param.numel()].view(param.shape)
        chunks[-1].params.append(param)
        chunks[-1].views.append(view)
        start += size
        # As bytes, since not every backend knows every dtype.
        chunks[-1].flat = flat[begin:start].view(torch.uint8)
        _adopt(param, view)
    return chunks


def _adopt(param: Tensor, view: Tensor) -> None:
    """Make `view` the memory of `param` if nobody else can be using the memory it has."""
    data = param.detach()
    view.copy_(data)
    owns_all = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    if owns_all and data.is_contiguous():
        param.data = view


def _moved(chunk: Chunk) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters that do not live in the buffer, which need a copy, with their views."""
    moved = []
    for param, view in zip(chunk.params, chunk.views, strict=True):
        if param.data_ptr() != view.data_ptr():
            _check_same_kind(param, view)
            moved.append((param, view))
    return moved


def _check_same_kind(param: Tensor, view: Tensor) -> None:
    now = (tuple(param.shape), param.dtype, param.device)
    then = (tuple(view.shape), view.dtype, view.device)
    if now != then:
        rule = f"keep the shape, dtype and device they had when given, {then}"
        raise bad("ShardedOptimizer", "parameters", rule, now)


def _padded_numel(param: Tensor) -> int:
    unit = _ALIGNMENT_BYTES // param.element_size()
    return -(-param.numel() // unit) * unit
