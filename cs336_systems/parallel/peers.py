"""torch's own data parallelism behind our methods, to be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.base import DataParallel

# More than any model has; torch takes no infinity.
_ONE_BUCKET_MB = 2**20
_HOOKS = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}


class TorchDDP(DataParallel):
    """torch.nn.parallel.DistributedDataParallel, with gradients in its buckets.

    Without find_unused its error for an unused parameter comes with the next forward pass.
    Raises: UsageError for what it has no counterpart of.
    """

    strategy = "torch_ddp"

    def __init__(
        self, module: nn.Module, *, bucket_size_mb: float | None = 25, **options: Any
    ) -> None:
        if options.get("check_finite"):
            raise UsageError("torch_ddp: check_finite must be off, torch has no such check")
        if bucket_size_mb is not None and not bucket_size_mb > 0:
            raise bad(self.strategy, "bucket_size_mb", "be positive or None", bucket_size_mb)
        super().__init__(module, own_options={"bucket_size_mb": bucket_size_mb}, **options)
        if self.communication_dtype not in (None, *_HOOKS):
            rule = "be torch.bfloat16, torch.float16 or None"
            raise bad(self.strategy, "communication_dtype", rule, self.communication_dtype)
        self._ddp = DistributedDataParallel(
            module,
            process_group=self.group,
            bucket_cap_mb=_ONE_BUCKET_MB if bucket_size_mb is None else bucket_size_mb,
            find_unused_parameters=self.find_unused,
            broadcast_buffers=options.get("broadcast_buffers", True),
            gradient_as_bucket_view=True,
        )
        if self.communication_dtype is not None:
            self._ddp.register_comm_hook(self.group, _HOOKS[self.communication_dtype])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module through torch's wrapper."""
        return self._ddp(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up locally."""
        with self._ddp.no_sync(), super().no_sync():
            yield

    def finish_gradient_synchronization(self) -> None:
        """Do nothing: torch's backward pass has waited for its reductions."""
