"""One bucket: gradients side by side in one run of memory that is reduced at once.

The memory is the gradients': after a parameter's gradient was adopted, `parameter.grad` is a view
of the bucket, and later ones add up in place.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.collectives import Group, all_reduce
from cs336_systems.parallel.layout import check_strided, gradient_strides

# Gradients begin at multiples of it, so that kernels may load them in whole vectors.
ALIGNMENT_BYTES = 16
# How much of a bucket may wait outside it, to be copied in with one kernel.
_PENDING_BYTES = 25 * 2**20


class Bucket:
    """Parameters of one dtype and device, and the memory of their gradients.

    communication_dtype: the bucket then has a second memory of that dtype, which travels.
    Shapes: flat and wire (numel,), padding included.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], communication_dtype: torch.dtype | None
    ) -> None:
        self.parameters = list(parameters)
        dtype, device = parameters[0].dtype, parameters[0].device
        wire_dtype = communication_dtype or dtype
        sizes = [padded_numel(parameter, communication_dtype) for parameter in parameters]
        self._offsets = [0, *accumulate(sizes)]
        self.flat = torch.zeros(self._offsets[-1], dtype=dtype, device=device)
        self.views = self._views_of(self.flat)
        self.wire, self._wire_views = self.flat, self.views
        if wire_dtype != dtype:
            self.wire = torch.zeros_like(self.flat, dtype=wire_dtype)
            self._wire_views = self._views_of(self.wire)
        self._work: dist.Work | None = None
        self._pending: list[int] = []
        self._pending_bytes = 0
        self._in_wire: set[int] = set()

    def adopt(self, slot: int) -> None:
        """Make the gradient of one parameter a view of the bucket."""
        parameter, view = self.parameters[slot], self.views[slot]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(check_strided(parameter.grad))
            parameter.grad = view

    def collect(self, slot: int) -> bool:
        """Note that a gradient is there to be reduced; tells whether enough are to be drained."""
        self._pending.append(slot)
        self._pending_bytes += self.views[slot].nbytes
        return self._pending_bytes >= _PENDING_BYTES

    def drain(self) -> list[Tensor]:
        """Copy collected gradients in, together; returns what is nobody's gradient any more."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        return self._copy_in(pending)

    def fill(self) -> list[Tensor]:
        """Have all that is to travel in `wire`, zeros for missing gradients; returns as `drain`."""
        return self._copy_in(range(len(self.parameters)))

    def launch(self, group: Group, average_op: Any, *, async_op: bool) -> None:
        """Start to reduce the bucket."""
        if self.wire.numel():
            self._work = all_reduce(self.wire, group, op=average_op, async_op=async_op)

    def complete(self, divisor: int) -> None:
        """Turn what arrived into averages, in the memory of the gradients."""
        if self._work is not None:
            self._work.wait()
        if self.wire is not self.flat:
            self.flat.copy_(self.wire)
        if divisor > 1:
            self.flat.div_(divisor)
        self._forget()

    def fill_gaps(self) -> None:
        """Give parameters that had no gradient the average of the others'."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None:
                parameter.grad = view

    def _forget(self) -> None:
        self._work = None
        self._pending, self._pending_bytes = [], 0
        self._in_wire = set()

    def _copy_in(self, slots: Iterable[int]) -> list[Tensor]:
        """Copy gradients to where they travel, with one kernel, and make them views."""
        sources, targets, gaps = [], [], []
        for slot in slots:
            if slot in self._in_wire:
                continue
            self._in_wire.add(slot)
            parameter, target = self.parameters[slot], self._wire_views[slot]
            if parameter.grad is None:
                gaps.append(target)
            elif parameter.grad is not target:
                sources.append(check_strided(parameter.grad))
                targets.append(target)
                parameter.grad = self.views[slot]
        if gaps:
            torch._foreach_zero_(gaps)
        if sources:
            torch._foreach_copy_(targets, sources)
        return sources

    def _views_of(self, memory: Tensor) -> list[Tensor]:
        pairs = zip(self.parameters, self._offsets, strict=False)
        return [
            memory.as_strided(parameter.shape, gradient_strides(parameter), offset)
            for parameter, offset in pairs
        ]


def padded_numel(parameter: Tensor, communication_dtype: torch.dtype | None) -> int:
    """Return how many elements a gradient takes up in a bucket."""
    smallest = min(parameter.dtype.itemsize, (communication_dtype or parameter.dtype).itemsize)
    step = ALIGNMENT_BYTES // smallest
    return -(-parameter.numel() // step) * step


def assign_buckets(
    sizes: Sequence[int], kinds: Sequence[Hashable], limit: float, first_limit: float
) -> list[list[int]]:
    """Divide items, in their order, into buckets of one kind and at most `limit` together.

    An item larger than the limit has a bucket of its own; the first bucket of each kind is held to
    `first_limit`. Buckets come in the order in which their last items do.
    """
    closed: list[list[int]] = []
    opened: dict[Hashable, list[int]] = {}
    begun: set[Hashable] = set()
    for item, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        bucket = opened.setdefault(kind, [])
        held_to = limit if kind in begun else min(limit, first_limit)
        if bucket and sum(sizes[other] for other in bucket) + size > held_to:
            closed.append(bucket)
            begun.add(kind)
            bucket = opened[kind] = []
        bucket.append(item)
    return sorted(closed + list(opened.values()), key=lambda bucket: bucket[-1])
