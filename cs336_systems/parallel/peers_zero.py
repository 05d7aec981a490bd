"""torch's own sharding of optimizer state behind our methods, to be compared with."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer

from cs336_systems.parallel.peers import TorchDDP

with warnings.catch_warnings():
    # Importing it uses what torch itself deprecates.
    warnings.filterwarnings("ignore", message="`torch.jit")
    from torch.distributed.optim import ZeroRedundancyOptimizer


class TorchZero(TorchDDP):
    """torch's DistributedDataParallel with its ZeroRedundancyOptimizer.

    Parameters must be of one dtype.
    """

    strategy = "torch_zero"

    def build_optimizer(
        self, optimizer_cls: type[Optimizer], params: Any = None, **kwargs: Any
    ) -> Optimizer:
        """Make torch's sharded optimizer of `params`, or of all that is trainable."""
        chosen = list(self._trainable()) if params is None else params
        return ZeroRedundancyOptimizer(
            chosen,
            optimizer_class=optimizer_cls,
            process_group=self.group,
            # One message per owner, its fastest way.
            parameters_as_bucket_view=True,
            **kwargs,
        )

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the plain module's optimizer would return, on rank 0 alone."""
        assert isinstance(optimizer, ZeroRedundancyOptimizer)
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if self.rank == 0 else {}
