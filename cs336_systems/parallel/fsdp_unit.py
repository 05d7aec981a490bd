"""A unit of FSDP: the weights that one call gathers, swapped in while they are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cs336_systems.parallel.fsdp_flat import FlatShard
from cs336_systems.parallel.fsdp_gradient import ShardedGradient
from cs336_systems.parallel.fsdp_plan import UnitPlan, Weight
from cs336_systems.parallel.fsdp_wire import Wire

if TYPE_CHECKING:
    from cs336_systems.parallel.fsdp_trace import Entry


class Unit:
    """The flat shards of one plan; trained and frozen weights and each dtype have their own."""

    def __init__(
        self,
        plan: UnitPlan,
        index: int,
        wire: Wire,
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
    ) -> None:
        self.name = plan.name
        self.index = index
        self.flats = [FlatShard(weights, wire, compute_dtype) for weights in _by_kind(plan.weights)]
        trainable = [flat for flat in self.flats if flat.is_trainable]
        self.gradients = [ShardedGradient(flat, wire, communication_dtype) for flat in trainable]
        # Reading frozen weights may come after the last gradient of trained ones.
        self.is_done_with_its_gradients = len(trainable) == len(self.flats)
        self.is_resident = False
        self.depth = 0
        self.entry: Entry | None = None
        self._missing = self._all_trainable()
        self._backward = current_backward()
        self._put_pieces()

    def watch_gradients(self, on_gradient: Callable[[Unit, ShardedGradient, int], None]) -> None:
        """Call `on_gradient(unit, gradient, index)` for each weight that has its gradient."""
        for gradient in self.gradients:
            for index, view in enumerate(gradient.flat.views):
                call = functools.partial(on_gradient, self, gradient, index)
                view.register_post_accumulate_grad_hook(_without_argument(call))

    def launch_gather(self) -> bool:
        """Start to gather unless the weights are there or on their way; tells whether it did."""
        if self.is_gathered:
            return False
        for flat in self.flats:
            flat.launch_gather()
        return True

    @property
    def is_gathered(self) -> bool:
        """Whether the weights are there, or on their way."""
        return any(flat.is_gathered for flat in self.flats)

    @property
    def version(self) -> int:
        """A number that changes whenever weights are changed in place."""
        return sum(flat.shard._version for flat in self.flats)

    def make_resident(self) -> None:
        """Wait for the gathered weights and let the layers see them."""
        if self.is_resident:
            return
        for flat in self.flats:
            flat.wait_gather()
            for owners, view in zip(flat.owners, flat.views, strict=True):
                for owner, name in owners:
                    # An instance attribute is found before the registered parameter.
                    owner.__dict__[name] = view
        self.is_resident = True

    def release(self) -> None:
        """Hide the gathered weights from the layers and free them."""
        if self.is_resident:
            for owner, name in self._places():
                owner.__dict__.pop(name, None)
            self.is_resident = False
        for flat in self.flats:
            flat.release()

    def has_all_gradients(self, gradient: ShardedGradient, index: int) -> bool:
        """Count one gradient; true with the last one of a backward pass."""
        task = current_backward()
        if task != self._backward:
            self._backward, self._missing = task, self._all_trainable()
        self._missing.discard((id(gradient), index))
        if self._missing:
            return False
        self._missing = self._all_trainable()
        return True

    def forget_gradients(self) -> None:
        """Start to count anew."""
        self._missing = self._all_trainable()

    def launch_reduce(self) -> None:
        """Start to average all gradients over the ranks."""
        self.forget_gradients()
        for gradient in self.gradients:
            gradient.launch_reduce()

    def wait_reduce(self) -> None:
        """Let what is computed next see the averages."""
        for gradient in self.gradients:
            gradient.wait_reduce()

    def _all_trainable(self) -> set[tuple[int, int]]:
        return {(id(g), index) for g in self.gradients for index in range(len(g.flat.views))}

    def _places(self) -> Iterator[tuple[nn.Module, str]]:
        return (place for flat in self.flats for owners in flat.owners for place in owners)

    def _put_pieces(self) -> None:
        for flat in self.flats:
            for owners, piece in zip(flat.owners, flat.pieces, strict=True):
                for owner, name in owners:
                    owner._parameters[name] = piece


def current_backward() -> int:
    """Return the number of the backward pass that this thread is in; -1 outside of one."""
    return torch._C._current_graph_task_id()


def _by_kind(weights: list[Weight]) -> list[list[Weight]]:
    kinds: dict[tuple[bool, torch.dtype], list[Weight]] = {}
    for weight in weights:
        key = (weight.parameter.requires_grad, weight.parameter.dtype)
        kinds.setdefault(key, []).append(weight)
    return list(kinds.values())


def _without_argument(call: Callable[[], None]) -> Callable[[Tensor], None]:
    return lambda _: call()
