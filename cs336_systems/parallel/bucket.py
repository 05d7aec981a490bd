"""One bucket: gradients that are reduced at once.

Small gradients lie side by side in one run of memory. That memory is the gradients': after one was
adopted, `parameter.grad` is a view of the bucket, and later ones add up in place. A large gradient
stays where autograd put it, a run of its own: nothing is gained by copying it next to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.layout import (
    check_strided,
    gradient_strides,
    in_memory_order,
    laid_out_gradient,
)

# Gradients begin at multiples of it, so that kernels may load them in whole vectors.
ALIGNMENT_BYTES = 16
# How much of a bucket may wait outside it, to be copied in with one kernel.
_PENDING_BYTES = 25 * 2**20


class Bucket:
    """Parameters of one dtype and device, and the memory of their gradients.

    communication_dtype: the bucket then has a second memory of that dtype, which travels.
    in_place_bytes: gradients of at least so many bytes are reduced where they lie, unless they
        travel in another dtype.
    Shapes: flat and wire (numel,), padding included; views are None for gradients in place.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        communication_dtype: torch.dtype | None,
        in_place_bytes: float = math.inf,
    ) -> None:
        self.parameters = list(parameters)
        dtype, device = parameters[0].dtype, parameters[0].device
        wire_dtype = communication_dtype or dtype
        self._is_in_place = [
            wire_dtype == dtype and parameter.nbytes >= in_place_bytes
            for parameter in self.parameters
        ]
        sizes = [
            0 if in_place else padded_numel(parameter, communication_dtype)
            for parameter, in_place in zip(self.parameters, self._is_in_place, strict=True)
        ]
        self._strides = [gradient_strides(parameter) for parameter in self.parameters]
        self._offsets = [0, *accumulate(sizes)]
        self._copied_bytes = [size * dtype.itemsize for size in sizes]
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
        self.messages: list[Tensor] = []
        """What is reduced, from `fill` to `complete`."""

    @property
    def message_bytes(self) -> int:
        """Return how much travels in a step, gradients in place included."""
        places = zip(self.parameters, self._is_in_place, strict=True)
        return self.wire.nbytes + sum(p.nbytes for p, in_place in places if in_place)

    def adopt(self, slot: int) -> None:
        """Make the gradient of one parameter a view of the bucket, or a memory of its own."""
        parameter, view = self.parameters[slot], self.views[slot]
        if parameter.grad is None or parameter.grad is view:
            return
        if view is None:
            self._own(slot)
        else:
            view.copy_(check_strided(parameter.grad))
            parameter.grad = view

    def collect(self, slot: int) -> bool:
        """Note that a gradient is there to be reduced; tells whether enough are to be drained."""
        if self._is_in_place[slot]:
            return False
        self._pending.append(slot)
        self._pending_bytes += self._copied_bytes[slot]
        return self._pending_bytes >= _PENDING_BYTES

    def drain(self) -> None:
        """Copy collected gradients in, together."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        self._copy_in(pending)

    def fill(self) -> None:
        """Have all that is to travel in `messages`, zeros for missing gradients."""
        self._copy_in(slot for slot, view in enumerate(self.views) if view is not None)
        runs = (self._own(slot) for slot, in_place in enumerate(self._is_in_place) if in_place)
        self.messages = [run for run in (self.wire, *runs) if run.numel()]

    def launch(self, reduce: Callable[[list[Tensor]], dist.Work | None]) -> None:
        """Start to reduce the bucket's messages in place; `reduce` returns what to wait for."""
        if self.messages:
            self._work = reduce(self.messages)

    def complete(self, divisor: int) -> None:
        """Turn what arrived into averages, in the memory of the gradients."""
        if self._work is not None:
            self._work.wait()
        if self.wire is not self.flat:
            self.flat.copy_(self.wire)
            self.messages = [self.flat]
        if divisor > 1 and self.messages:
            torch._foreach_div_(self.messages, divisor)
        self._forget()

    def fill_gaps(self) -> None:
        """Give parameters that had no gradient the average of the others'."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None and view is not None:
                parameter.grad = view

    def _own(self, slot: int) -> Tensor:
        """Return a gradient in place as a run of memory that is its own, made so if it was not."""
        grad = laid_out_gradient(self.parameters[slot], self._strides[slot])
        if grad.requires_grad or not grad.is_contiguous():
            return in_memory_order(grad.detach())
        return grad

    def _forget(self) -> None:
        self._work = None
        self._pending, self._pending_bytes = [], 0
        self._in_wire = set()
        self.messages = []

    def _copy_in(self, slots: Iterable[int]) -> None:
        """Copy gradients to where they travel, with one kernel, and make them views."""
        sources, targets, gaps = [], [], []
        for slot in slots:
            if slot in self._in_wire:
                continue
            self._in_wire.add(slot)
            parameter, target = self.parameters[slot], self._wire_views[slot]
            assert target is not None
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

    def _views_of(self, memory: Tensor) -> list[Tensor | None]:
        places = zip(self.parameters, self._strides, self._is_in_place, self._offsets, strict=False)
        return [
            None if in_place else memory.as_strided(parameter.shape, strides, offset)
            for parameter, strides, in_place, offset in places
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
