"""After the backward pass, one all-reduce for each gradient, each waited for."""

from __future__ import annotations

import torch

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.parallel.layout import in_memory_order, laid_out_gradient


class Local(DataParallel):
    """Start equal, then train every rank alone: what a step costs without communication."""

    strategy = "none"

    def _start_forward(self) -> None:
        return

    def finish_gradient_synchronization(self) -> None:
        """Leave the gradients as they are."""


class Naive(DataParallel):
    """Reduce one gradient after the other, in the order of the parameters.

    Cost: one collective per parameter, none of them beside the backward pass.
    """

    strategy = "naive"

    def _reduce(self) -> None:
        self._grads = [in_memory_order(laid_out_gradient(p)) for p in self._trainable()]
        wires = [grad.to(self.communication_dtype or grad.dtype) for grad in self._grads]
        self._watch(wires)
        for grad, wire in zip(self._grads, wires, strict=True):
            if grad.numel():
                all_reduce(wire, self.group, op=self._average_op)
                if wire is not grad:
                    grad.copy_(wire)

    def _complete(self) -> None:
        if self._divisor > 1:
            torch._foreach_div_(self._grads, self._divisor)
