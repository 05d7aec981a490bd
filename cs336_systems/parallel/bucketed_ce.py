"""`flashddp` between the GPUs of one host, whose multiprocessors are left to the backward pass.

What a bucket holds, when it leaves and where its averages lie stays as it is; only the way its
messages take is another one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cs336_systems.errors import bad
from cs336_systems.parallel.bucketed import FlashDDP
from cs336_systems.parallel.copy_engines import CopyEngines
from cs336_systems.parallel.memory_model import EXCHANGE_BYTES

_MIB = 2**20


class FlashDDPCE(FlashDDP):
    """Reduce buckets by copies into the memory of the other ranks, all of them on one host.

    exchange_mb: MiB that each rank sets aside for what arrives, no more than all gradients take;
        buckets that are larger travel in pieces. None where there is one rank.
    Cost: that memory. On a CPU a bucket is waited for as soon as it is sent.
    Raises: UsageError, with the same text on all ranks, where they are on several hosts, share a
        GPU or cannot access each other's.
    """

    strategy = "flashddp_ce"

    def __init__(
        self, module: nn.Module, *, exchange_mb: float = EXCHANGE_BYTES / _MIB, **options: Any
    ) -> None:
        if not 0 < exchange_mb < float("inf"):
            raise bad(self.strategy, "exchange_mb", "be positive and finite", exchange_mb)
        super().__init__(module, own_options={"exchange_mb": exchange_mb}, **options)
        needed = sum(bucket.message_bytes for bucket in self._buckets)
        self._engines = CopyEngines(
            self.group,
            self._device,
            min(int(exchange_mb * _MIB), needed),
            where=self.strategy,
        )
        self._divisor = 1

    def _send(self, messages: list[Tensor]) -> None:
        self._engines.average_(messages)
