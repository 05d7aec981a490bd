"""During the backward pass, one asynchronous all-reduce for each gradient as it appears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.parallel.hooked import HookedDataParallel
from cs336_systems.parallel.layout import in_memory_order, laid_out_gradient


class Overlapped(HookedDataParallel):
    """Reduce each gradient where it lies, while the layers before it compute theirs.

    Cost: one collective per parameter, all of them beside the backward pass.
    """

    strategy = "overlapped"

    def _plan(self, order: Sequence[int]) -> list[list[int]]:
        # The memory in flight: gradients, what travels for them, and the handles to wait for.
        self._in_flight: list[tuple[Tensor, Tensor, dist.Work]] = []
        self._units: list[nn.Parameter] = [self._hooked[index] for index in order]
        return [[index] for index in order]

    def _launch(self, unit: int) -> None:
        grad = in_memory_order(laid_out_gradient(self._units[unit]))
        if grad.numel():
            wire = grad.to(self.communication_dtype or grad.dtype)
            self._watch([wire])
            work = all_reduce(wire, self.group, op=self._average_op, async_op=True)
            assert work is not None
            self._in_flight.append((grad, wire, work))

    def _wait(self) -> None:
        for grad, wire, work in self._in_flight:
            work.wait()
            if wire is not grad:
                grad.copy_(wire)
        if self._divisor > 1 and self._in_flight:
            torch._foreach_div_([grad for grad, _, _ in self._in_flight], self._divisor)
        self._in_flight = []
