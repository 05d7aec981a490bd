"""After the backward pass, one all-reduce of all gradients laid one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.parallel.layout import in_memory_order, laid_out_gradient


class Flat(DataParallel):
    """Reduce the concatenated gradients, one collective per dtype.

    Cost: two copies of every gradient, and their size again while a step is finished.
    """

    strategy = "flat"

    def _reduce(self) -> None:
        for grads in self._by_dtype():
            sizes = [grad.numel() for grad in grads]
            if not sum(sizes):
                continue
            wire = torch.cat(grads).to(self.communication_dtype or grads[0].dtype)
            self._watch([wire])
            all_reduce(wire, self.group, op=self._average_op)
            average = wire.to(grads[0].dtype)
            if self._divisor > 1:
                average.div_(self._divisor)
            torch._foreach_copy_(grads, average.split(sizes))

    def _complete(self) -> None:
        return

    def _by_dtype(self) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._trainable():
            grad = in_memory_order(laid_out_gradient(parameter))
            groups.setdefault(grad.dtype, []).append(grad)
        return list(groups.values())
