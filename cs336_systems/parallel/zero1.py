"""Data parallelism whose optimizer state is spread over the ranks: stage 1 of ZeRO.

Gradients go the way of `flashddp`, all-reduced in buckets. Reducing each to its owner alone would
save a third of a step's bytes, but those are hidden behind the backward pass, and what it costs is
not: one message for every owner in every bucket, another collective for the global norm, and
gradients that users can read on one rank only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cs336_systems.parallel.bucketed import FlashDDP
from cs336_systems.parallel.forward_waits import ForwardWaits
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer


class Zero1(FlashDDP):
    """`flashddp` with a `ShardedOptimizer`.

    overlap: the optimizer's exchange goes on during the next forward pass. Until then, read
        parameters through this wrapper, a state dict, or after the optimizer's `wait()`: those of
        the wrapped module itself, read directly, may still be the old ones.
    """

    strategy = "zero1"
    compiles_whole = False

    def __init__(self, module: nn.Module, *, overlap: bool = True, **options: Any) -> None:
        super().__init__(module, **options)
        self.overlap = overlap
        self._waits = ForwardWaits(module)

    def build_optimizer(
        self, optimizer_cls: type[Optimizer], params: Any = None, **kwargs: Any
    ) -> ShardedOptimizer:
        """Make the sharded optimizer of `params`, or of all that is trainable, on every rank."""
        self._waits.wait_for_all()
        chosen = list(self._trainable()) if params is None else params
        optimizer = ShardedOptimizer(
            chosen, optimizer_cls, self.group, overlap=self.overlap, **kwargs
        )
        self._waits.add(optimizer)
        return optimizer

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the plain module's optimizer would return, on rank 0 alone."""
        assert isinstance(optimizer, ShardedOptimizer)
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if self.rank == 0 else {}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the parameters, up to date."""
        self._waits.wait_for_all()
        return super().named_parameters(*args, **kwargs)
