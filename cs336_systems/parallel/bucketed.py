"""During the backward pass, one all-reduce for each bucket of gradients as it fills.

On a GPU the buckets travel on a stream of their own with high priority: the copies of the few
thread blocks a collective needs are then not queued behind a whole backward pass of kernels. No
call waits for the device; `finish_gradient_synchronization` orders one stream behind the other.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.errors import bad
from cs336_systems.parallel.bucket import Bucket, assign_buckets, padded_numel
from cs336_systems.parallel.collectives import all_reduce_together
from cs336_systems.parallel.hooked import HookedDataParallel
from cs336_systems.parallel.side_stream import SideStream

_MIB = 2**20
# A small first bucket is on its way soon, when there is nothing else to overlap with.
_FIRST_BUCKET_BYTES = _MIB


class FlashDDP(HookedDataParallel):
    """Reduce gradients in buckets, in which they live.

    bucket_size_mb: the most a bucket holds, in MiB; None is one bucket for each dtype.
    in_place_mb: gradients of at least so many MiB are part of a bucket without being copied into
        its memory, if they travel in their own dtype; None copies all.
    Cost: no memory beside the gradients; with communication_dtype, a copy in that dtype.
    """

    strategy = "flashddp"

    def __init__(
        self,
        module: nn.Module,
        *,
        bucket_size_mb: float | None = 100,
        in_place_mb: float | None = 1,
        own_options: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        if bucket_size_mb is not None and not bucket_size_mb > 0:
            raise bad(self.strategy, "bucket_size_mb", "be positive or None", bucket_size_mb)
        if in_place_mb is not None and not in_place_mb >= 0:
            raise bad(self.strategy, "in_place_mb", "be >= 0 or None", in_place_mb)
        own = {"bucket_size_mb": bucket_size_mb, "in_place_mb": in_place_mb}
        super().__init__(module, own_options={**own, **(own_options or {})}, **options)
        self._side = SideStream(self._device)

    def _plan(self, order: Sequence[int]) -> list[list[int]]:
        # The old memory goes before the new one comes, but for gradients that still lie in it.
        self._buckets: list[Bucket] = []
        self._place: dict[int, tuple[Bucket, int]] = {}
        parameters = [self._hooked[index] for index in order]
        sizes = [
            padded_numel(parameter, self.communication_dtype) * parameter.dtype.itemsize
            for parameter in parameters
        ]
        megabytes, in_place_mb = (
            self.own_options[name] for name in ("bucket_size_mb", "in_place_mb")
        )
        limit, first_limit = (
            (math.inf, math.inf) if megabytes is None else (megabytes * _MIB, _FIRST_BUCKET_BYTES)
        )
        in_place_bytes = math.inf if in_place_mb is None else in_place_mb * _MIB
        assigned = assign_buckets(sizes, [p.dtype for p in parameters], limit, first_limit)
        for items in assigned:
            chosen = [parameters[item] for item in items]
            bucket = Bucket(chosen, self.communication_dtype, in_place_bytes)
            self._buckets.append(bucket)
            for slot, item in enumerate(items):
                self._place[order[item]] = bucket, slot
        return [[order[item] for item in items] for items in assigned]

    def _keep(self, index: int) -> None:
        bucket, slot = self._place[index]
        bucket.adopt(slot)

    def _collect(self, index: int) -> None:
        bucket, slot = self._place[index]
        if bucket.collect(slot):
            bucket.drain()

    def _launch(self, unit: int) -> None:
        bucket = self._buckets[unit]
        bucket.fill()
        self._watch(bucket.messages)
        with self._side.entered():
            bucket.launch(self._send)
            if self._side.is_beside:
                bucket.complete(self._divisor)

    def _send(self, messages: list[Tensor]) -> dist.Work | None:
        """Start to reduce a bucket's messages in place, to what `_divisor` makes averages."""
        return all_reduce_together(
            messages, self.group, op=self._average_op, async_op=not self._side.is_beside
        )

    def _wait(self) -> None:
        self._side.join()
        for bucket in self._buckets:
            if not self._side.is_beside:
                bucket.complete(self._divisor)
            bucket.fill_gaps()

    def _reporting(self) -> AbstractContextManager[Any]:
        # One stream for all collectives of a step, so that the device runs them in order as well.
        return self._side.entered()
