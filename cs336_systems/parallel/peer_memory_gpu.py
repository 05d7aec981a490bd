"""Memory that the GPUs of one host map from each other, and signals that their streams wait for.

Copies between such memories are made by the GPUs' copy engines; the driver's stream operations
signal and wait. Neither needs a multiprocessor, all of which are left to the computation.

Source: CUDA driver API, "Stream Memory Operations"; torch.distributed._symmetric_memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from cs336_systems.parallel.collectives import Group, all_gather_object, process_group
from cs336_systems.parallel.peer_average import average
from cs336_systems.parallel.peer_memory import NUM_SIGNALS

_FLAG_BYTES = 4
# Of both stream operations: writes come after all before them, waits are for "greater or equal".
_DEFAULT = 0


class GpuMemory:
    """`peer_memory.PeerMemory` in the GPU's memory."""

    def __init__(self, group: Group, device: torch.device, num_bytes: int, *, where: str) -> None:
        # Imported late: only this strategy needs it, and only on GPUs.
        from cuda.bindings import driver

        self._driver: Any = driver
        self._where, self._device = where, device
        name = process_group(group).group_name
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._peers = [peer for peer in range(self._world_size) if peer != self._rank]
        self.memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self.memory, name)
        num_flags = NUM_SIGNALS * self._world_size
        self._flags = symmetric_memory.empty(num_flags, dtype=torch.int32, device=device)
        self._flags.zero_()
        self._flag_handle = symmetric_memory.rendezvous(self._flags, name)
        # No signal may come before the flags are zero everywhere.
        torch.cuda.synchronize(device)
        all_gather_object(None, group)

    def view(self, peer: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """As `PeerMemory.view`."""
        return self._handle.get_buffer(peer, [numel], dtype, offset // dtype.itemsize)

    def signal(self, which: int, sequence: int) -> None:
        """As `PeerMemory.signal`."""
        stream = self._stream()
        for peer in self._peers:
            flag = self._flag(peer, which, self._rank)
            self._check(self._driver.cuStreamWriteValue32(stream, flag, sequence, _DEFAULT))

    def wait(self, which: int, sequence: int) -> None:
        """As `PeerMemory.wait`."""
        stream = self._stream()
        for peer in self._peers:
            flag = self._flag(self._rank, which, peer)
            self._check(self._driver.cuStreamWaitValue32(stream, flag, sequence, _DEFAULT))

    def average(self, own: Tensor, others: Tensor, result: Tensor) -> None:
        """As `PeerMemory.average`."""
        average(own, others, result, self._rank)

    def _flag(self, owner: int, which: int, source: int) -> int:
        """Return the address of one of `owner`'s flags, as this rank maps it."""
        number = which * self._world_size + source
        return self._flag_handle.buffer_ptrs[owner] + number * _FLAG_BYTES

    def _stream(self) -> Any:
        return self._driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)

    def _check(self, answer: tuple[Any, ...]) -> None:
        if answer[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self._where}: the CUDA driver answered {answer[0]}")
