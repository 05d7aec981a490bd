"""The states of a sharded module: whole on every rank, or in parts for a distributed checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.fsdp_flat import FlatShard

if TYPE_CHECKING:
    from cs336_systems.parallel.fsdp import FullyShardedDataParallel

_WHERE = "fsdp"


def flats(model: FullyShardedDataParallel) -> list[FlatShard]:
    """Return all flat shards, in an order that is the same on every rank."""
    return [flat for unit in model.units for flat in unit.flats]


def places(model: FullyShardedDataParallel) -> dict[str, tuple[FlatShard, int]]:
    """Return where each sharded weight is, by all of its names."""
    return {
        name: (flat, index)
        for flat in flats(model)
        for index, names in enumerate(flat.names)
        for name in names
    }


@torch.no_grad()
def full_state_dict(model: FullyShardedDataParallel) -> dict[str, Any]:
    """Return a copy of the plain module's state, collected from all ranks."""
    state = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in model.module.state_dict().items()
    }
    for flat in flats(model):
        whole = flat.collect(flat.shard)
        for index, names in enumerate(flat.names):
            weight = flat.layout.weight(
                whole, index
            ).clone()  # not a view, or saving it saves the others
            state.update({name: weight for name in names if name in state})
    return state


@torch.no_grad()
def load_full_state_dict(model: FullyShardedDataParallel, state: Mapping[str, Any]) -> None:
    """Copy this rank's part of every weight from a state of the plain module."""
    own, sharded = model.module.state_dict(), places(model)
    if unfit := sorted(set(own) ^ set(state)):
        there = "missing" if unfit[0] in own else "unexpected"
        raise UsageError(f"{_WHERE}: state must have the module's names, got {there} {unfit[0]!r}")
    for name, value in own.items():
        shape = (
            sharded[name][0].layout.shapes[sharded[name][1]] if name in sharded else _shape(value)
        )
        if shape is not None and _shape(state[name]) != shape:
            rule = f"have shape {tuple(shape)}"
            raise bad(_WHERE, f"state {name!r}", rule, tuple(_shape(state[name]) or ()))
    for name, (flat, index) in sharded.items():
        if name in state:
            start, stop = flat.layout.ranges[index]
            flat.layout.piece(flat.shard, index).copy_(state[name].reshape(-1)[start:stop])
    model.forget_gathered()
    rest = {name: value for name, value in state.items() if name not in sharded}
    model.module.load_state_dict(rest, strict=False)


def check_pieces(model: FullyShardedDataParallel, state: Mapping[str, Any]) -> None:
    """Check that a state holds this rank's pieces.

    Raises: UsageError for whole weights, naming what loads them.
    """
    own = model.module.state_dict()
    for name, (flat, index) in places(model).items():
        shape = _shape(state.get(name))
        if shape is not None and shape != own[name].shape and shape == flat.layout.shapes[index]:
            raise UsageError(
                f"{_WHERE}: load_state_dict must get this rank's pieces, got the whole {name!r}; "
                "load_full_state_dict takes it"
            )


def sharded_state_dict(model: FullyShardedDataParallel) -> dict[str, Any]:
    """Return the state with sharded weights as `SavedShard`s."""
    state: dict[str, Any] = dict(model.module.state_dict())
    for name, (flat, index) in places(model).items():
        if name in state:
            start, _ = flat.layout.ranges[index]
            piece = flat.layout.piece(flat.shard, index)
            state[name] = SavedShard.of(piece, start, flat.layout.shapes[index])
    return state


class SavedShard(Tensor):
    """A run of a tensor's elements, which a distributed checkpoint sees as rectangles of it.

    `torch.distributed.checkpoint` asks tensors for their parts by the three methods below.
    Shapes: local (numel of the run,); `size()` is that of the whole tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    local: Tensor
    _whole: torch.Size
    _chunks: dict[torch.Size, ChunkStorageMetadata]

    @classmethod
    def of(cls, local: Tensor, start: int, whole: torch.Size) -> Self:
        """Wrap the run that begins with element `start`; its memory is shared."""
        shard = local.as_subclass(cls)
        shard.local, shard._whole = local, whole
        runs = list(rectangles(start, start + local.numel(), whole))
        if not math.prod(whole):  # a tensor without elements is still an entry of the checkpoint
            runs = [((0,) * len(whole), tuple(whole))]
        shard._chunks = {
            torch.Size(offsets): ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in runs
        }
        return shard

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the whole tensor."""
        return self._whole if dim is None else self._whole[dim]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self._whole),
            )
            for offsets, chunk in self._chunks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return list(self._chunks.values())

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        begin = 0
        for offsets, chunk in self._chunks.items():
            numel = math.prod(chunk.sizes)
            if offsets == index.offset:
                return self.local[begin : begin + numel].view(chunk.sizes)
            begin += numel
        raise KeyError(index)


def rectangles(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of the rectangles that a run of a tensor's elements consists of, in
    the order of the elements: the rest of a row, whole rows, the begin of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # all of it lies in one row
        yield from _within_row(end_whole, start, stop, shape)
        return
    yield from _within_row(first_whole - 1, start, first_whole * row, shape)
    if first_whole < end_whole:
        zeros = (0,) * (len(shape) - 1)
        yield (first_whole, *zeros), (end_whole - first_whole, *shape[1:])
    yield from _within_row(end_whole, end_whole * row, stop, shape)


def _within_row(
    number: int, start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    begin = number * math.prod(shape[1:])
    for offsets, sizes in rectangles(start - begin, stop - begin, shape[1:]):
        yield (number, *offsets), (1, *sizes)


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
