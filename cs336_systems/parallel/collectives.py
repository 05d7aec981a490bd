"""Every message between ranks goes through here, where it can be counted.

Each function is torch.distributed's with the group's own ranks as sources, plus one line that tells
the observers what is on its way: number, order and size of collectives are results to be tested.
What travels without torch.distributed (`copy_engines`) announces itself in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

Group = dist.ProcessGroup | None
"""The ranks that take part; None is all of them."""


@dataclass(frozen=True)
class Collective:
    """One collective as its caller issued it."""

    name: str
    numel: int
    """Elements of the largest tensor of the call, the whole, of which a rank may hold a part; the
    sum of those that are combined together."""
    dtype: torch.dtype | None
    """None for Python objects, whose size is not counted."""
    num_bytes: int
    world_size: int


_observers: list[list[Collective]] = []


@contextmanager
def record_collectives() -> Iterator[list[Collective]]:
    """Collect what this rank issues while the context is open, in order."""
    log: list[Collective] = []
    _observers.append(log)
    try:
        yield log
    finally:
        # By identity: two empty logs are equal.
        _observers[:] = [other for other in _observers if other is not log]


def all_reduce(
    tensor: Tensor, group: Group = None, *, op: Any = ReduceOp.SUM, async_op: bool = False
) -> dist.Work | None:
    """Combine `tensor` over the ranks, in place; the handle to wait for when asynchronous."""
    announce("all_reduce", [tensor], group)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def all_reduce_together(
    tensors: Sequence[Tensor],
    group: Group = None,
    *,
    op: Any = ReduceOp.SUM,
    async_op: bool = False,
) -> dist.Work | None:
    """Combine each of several tensors of one dtype over the ranks, in place, with one launch."""
    if len(tensors) == 1:
        return all_reduce(tensors[0], group, op=op, async_op=async_op)
    announce("all_reduce", tensors, group)
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp, options.asyncOp = op, async_op
    work = process_group(group).allreduce_coalesced(list(tensors), options)
    if async_op:
        return work
    # As torch's own functions do: on a GPU without a handle there is nothing to wait for.
    if work is not None:
        work.wait()
    return None


def broadcast(
    tensor: Tensor, group: Group = None, *, source: int = 0, async_op: bool = False
) -> dist.Work | None:
    """Overwrite `tensor` with that of the group's rank `source`."""
    announce("broadcast", [tensor], group)
    return dist.broadcast(tensor, group=group, group_src=source, async_op=async_op)


def all_gather_into(
    output: Tensor, shard: Tensor, group: Group = None, *, async_op: bool = False
) -> dist.Work | None:
    """Put every rank's `shard` one after the other into `output`.

    Shapes: shard (numel,) -> output (world_size * numel,).
    """
    announce("all_gather_into", [output], group)
    return dist.all_gather_into_tensor(output, shard, group=group, async_op=async_op)


def reduce_scatter_into(
    shard: Tensor,
    whole: Tensor,
    group: Group = None,
    *,
    op: Any = ReduceOp.SUM,
    async_op: bool = False,
) -> dist.Work | None:
    """Combine `whole` over the ranks and keep this rank's part of it in `shard`.

    Shapes: whole (world_size * numel,) -> shard (numel,).
    """
    announce("reduce_scatter_into", [whole], group)
    return dist.reduce_scatter_tensor(shard, whole, op=op, group=group, async_op=async_op)


def all_gather_object(value: Any, group: Group = None) -> list[Any]:
    """Return every rank's `value`, by rank."""
    announce("all_gather_object", [], group)
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def process_group(group: Group) -> dist.ProcessGroup:
    """Return the group itself where None stands for all ranks."""
    chosen = group if group is not None else dist.group.WORLD
    assert chosen is not None
    return chosen


def is_power_of_two(world_size: int) -> bool:
    """Tell whether multiplying by 1 / world_size has the bits of dividing by it."""
    return world_size & (world_size - 1) == 0


def averaging(group: Group, device: torch.device) -> tuple[Any, int]:
    """Return the reduction that leads to an average on a device, and what is left to divide by.

    NCCL's average scales before it adds, which gives the bits of dividing the sum only where the
    factor is a power of two.
    """
    world_size = dist.get_world_size(group)
    is_nccl = f"{device.type}:nccl" in dist.get_backend_config(group)
    if is_nccl and is_power_of_two(world_size):
        return ReduceOp.AVG, 1
    return ReduceOp.SUM, world_size


def communication_device(group: Group = None) -> torch.device:
    """Return the device whose tensors the group's backend moves; the CPU if it moves both."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def announce(name: str, tensors: Sequence[Tensor], group: Group) -> None:
    """Tell the observers what is on its way; for messages that take another way as well."""
    if not _observers:
        return
    entry = Collective(
        name,
        numel=sum(tensor.numel() for tensor in tensors),
        dtype=tensors[0].dtype if tensors else None,
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        world_size=dist.get_world_size(group),
    )
    for log in _observers:
        log.append(entry)
