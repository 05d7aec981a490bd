"""Reductions that start while the backward pass still runs, from hooks on the gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cs336_systems.errors import UsageError
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import broadcast
from cs336_systems.parallel.ready_queue import ReadyQueue


class HookedDataParallel(DataParallel):
    """Launch unit after unit as their gradients appear, in an order all ranks agree on.

    The order is at first that of the parameters from last to first, and from the second step on
    the one in which rank 0 saw the gradients appear.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self._hooked = list(self._trainable())
        self._order = list(reversed(range(len(self._hooked))))
        self._observed: list[int] | None = None
        self._is_order_final = False
        self._queue = ReadyQueue(self._plan(self._order))
        handles = [
            parameter.register_post_accumulate_grad_hook(_Hook(self, index))
            for index, parameter in enumerate(self._hooked)
        ]
        # A module that is wrapped again must not reduce its gradients twice.
        weakref.finalize(self, _remove, handles).atexit = False

    # What a strategy defines.

    def _plan(self, order: Sequence[int]) -> list[list[int]]:
        """Divide the parameters, in this order, into units that are launched together."""
        raise NotImplementedError

    def _launch(self, unit: int) -> None:
        """Start to reduce a unit; a missing gradient counts as zeros."""
        raise NotImplementedError

    def _wait(self) -> None:
        """Put the averages where the gradients are, also for parameters that had none."""
        raise NotImplementedError

    def _keep(self, index: int) -> None:
        """Take a gradient that is not to be reduced yet."""

    def _collect(self, index: int) -> None:
        """Take a gradient that is to be reduced."""

    # The step's protocol.

    def _on_gradient(self, index: int) -> None:
        if not self._synchronizing:
            self._keep(index)
            return
        if index in self._queue:
            raise UsageError(
                f"{self.strategy}: backward must run once per step outside no_sync(), got a second "
                f"gradient of {self._name(index)!r} (reentrant checkpoints also cause it)"
            )
        self._collect(index)
        for unit in self._queue.mark(index):
            self._launch(unit)

    def _is_unfinished(self) -> bool:
        return bool(self._queue.marked)

    def _reduce(self) -> None:
        for unit in self._queue.rest():
            self._launch(unit)

    def _complete(self) -> None:
        self._wait()
        if self._observed is None:
            seen = self._queue.marked
            self._observed = seen + [index for index in self._order if index not in set(seen)]
        self._queue.reset()

    def _prepare_forward(self) -> None:
        if self._observed is None or self._is_order_final:
            return
        agreed = torch.tensor(self._observed, device=self._device)
        broadcast(agreed, self.group)
        self._is_order_final = True
        if (order := agreed.tolist()) != self._order:
            self._order = order
            self._queue = ReadyQueue(self._plan(order))

    def _name(self, index: int) -> str:
        found = self._hooked[index]
        return next(name for name, p in self._parameters_once.items() if p is found)


class _Hook:
    """Tells the wrapper of a gradient, as long as there is a wrapper."""

    def __init__(self, wrapper: HookedDataParallel, index: int) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._index = index

    def __call__(self, _parameter: torch.Tensor) -> None:
        if (wrapper := self._wrapper()) is not None:
            wrapper._on_gradient(self._index)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
