"""Gradients of what a sharding strategy replicates: few, small, averaged in one run of memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.parallel.fsdp_wire import Wire
from cs336_systems.parallel.layout import in_memory_order, laid_out_gradient
from cs336_systems.parallel.side_stream import Ticket

# Whole models can be of this kind; then their gradients' copies are bounded.
_BUCKET_BYTES = 25 * 2**20


class ReplicatedGradients:
    """Averages the gradients of `parameters`, one all-reduce per dtype and bucket.

    Cost: two copies of every gradient; a bucket's size beside them.
    """

    def __init__(
        self, parameters: list[nn.Parameter], wire: Wire, communication_dtype: torch.dtype | None
    ) -> None:
        self.parameters = parameters
        self._buckets = _buckets(parameters)
        self._wire = wire
        self._communication_dtype = communication_dtype
        self._under_way: list[tuple[list[Tensor], Tensor, Ticket]] = []

    def launch(self) -> None:
        """Start all reductions; a missing gradient counts as zeros."""
        for parameters in self._buckets:
            grads = [in_memory_order(laid_out_gradient(parameter)) for parameter in parameters]
            self._wire.watch(grads)
            vector = torch.cat(grads).to(self._communication_dtype or grads[0].dtype)
            self._under_way.append((grads, vector, self._launch(vector)))

    def _launch(self, vector: Tensor) -> Ticket:
        def reduce(async_op: bool) -> dist.Work | None:
            op = self._wire.average_op
            return all_reduce(vector, self._wire.group, op=op, async_op=async_op)

        return self._wire.side.launch(reduce)

    def complete(self) -> None:
        """Put the averages where the gradients are."""
        for grads, vector, ticket in self._under_way:
            ticket.wait()
            average = vector.to(grads[0].dtype)
            if self._wire.divisor > 1:
                average.div_(self._wire.divisor)
            torch._foreach_copy_(grads, average.split([grad.numel() for grad in grads]))
        self._under_way.clear()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    opened: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if not parameter.numel():
            continue
        bucket = opened.get(parameter.dtype)
        held = sum(other.nbytes for other in bucket or [])
        if bucket is None or held + parameter.nbytes > _BUCKET_BYTES:
            bucket = opened[parameter.dtype] = []
            buckets.append(bucket)
        bucket.append(parameter)
    return buckets
