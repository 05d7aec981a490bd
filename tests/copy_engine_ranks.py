"""What ranks do in the tests of `copy_engines`; imports no pytest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import stack
from torch import Tensor

from cs336_systems.errors import UsageError
from cs336_systems.parallel import copy_engines, peer_memory_host, wrap
from cs336_systems.parallel.collectives import all_gather_object, communication_device
from cs336_systems.parallel.copy_engines import CopyEngines
from cs336_systems.parallel.peer_memory import AVERAGED
from cs336_systems.parallel.peer_memory_host import HostMemory
from cs336_systems.parallel.peer_places import Place

FAULTY = 1
"""The rank in which things go wrong."""
_FILE = "cs336-peers-"


def runs_of(rank: int, sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return a rank's numbers, none so small that half of one would be rounded."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2 - 1 for size in sizes]
    return [((1 + torch.rand(sign.shape, generator=generator)) * sign).to(dtype) for sign in signs]


def by_hand(by_rank: Sequence[Tensor]) -> Tensor:
    """Add in ranks' order and divide, 16-bit numbers in fp32, and round once."""
    wide = torch.promote_types(by_rank[0].dtype, torch.float32)
    total = by_rank[0].to(wide)
    for other in by_rank[1:]:
        total = total + other
    return (total / len(by_rank)).to(by_rank[0].dtype)


def average(
    sizes: Sequence[int],
    dtype: torch.dtype,
    capacity_bytes: int,
    *,
    num_calls: int = 3,
    delayed_ms: float = 0.0,
    first_sequence: int = 0,
    against_nccl: bool = False,
) -> list[bool]:
    """Average again and again through one memory; tells of every call whether the bits are right.

    delayed_ms: the most that a rank comes later than it could, each time another while.
    against_nccl: what is right is what NCCL's average gives.
    """
    device, rank, num_ranks = communication_device(), dist.get_rank(), dist.get_world_size()
    engines = CopyEngines(None, device, capacity_bytes)
    engines._sequence = first_sequence
    if first_sequence and engines._peers:
        # As if there had been that many calls: flags are where the last one left them.
        engines._memory.signal(0, first_sequence)
        engines._memory.signal(1, first_sequence)
        if device.type == "cuda":
            torch.cuda.synchronize()
        all_gather_object(None)
    late = torch.Generator().manual_seed(rank)
    right = []
    for call in range(num_calls):
        runs = [run.to(device) for run in runs_of(rank, sizes, dtype, call)]
        # Gradients have as many dimensions as their parameters.
        given = [run.view(1, -1) if number % 2 else run for number, run in enumerate(runs)]
        time.sleep(delayed_ms * torch.rand((), generator=late).item() / 1e3)
        engines.average_(given)
        every = [runs_of(other, sizes, dtype, call) for other in range(num_ranks)]
        wanted = [by_hand(of_run) for of_run in zip(*every, strict=True)]
        if against_nccl:
            for run, mine in zip(every[rank], wanted, strict=True):
                sent = run.to(device)
                dist.all_reduce(sent, op=dist.ReduceOp.AVG)
                mine.copy_(sent)
        right.append(all(map(torch.equal, (run.cpu() for run in runs), wanted)))
    return right


def average_with(mistake: str) -> list[bool]:
    """As `average`, with one wait left out on rank 0 and the others late where it matters."""
    plain = HostMemory.wait, HostMemory.average

    def wait(self: HostMemory, which: int, sequence: int) -> None:
        if (which == AVERAGED) != (mistake == "averaged") or self._rank != 0:
            plain[0](self, which, sequence)

    def late(self: HostMemory, *args: Any) -> None:
        if self._rank != 0:
            time.sleep(0.05)
        plain[1](self, *args)

    HostMemory.wait, HostMemory.average = wait, late
    try:
        delayed_ms = 50.0 if mistake == "pushed" else 0.0
        return average([64], torch.float32, 4096, num_calls=2, delayed_ms=delayed_ms)
    finally:
        HostMemory.wait, HostMemory.average = plain


def files_left() -> list[str]:
    """Return the mapped files of shared memory that still have a name."""
    engines = CopyEngines(None, communication_device(), 4096)
    all_gather_object(None)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if _FILE in line]
    assert mapped
    engines.average_([torch.ones(3)])
    return [line for line in mapped if not line.endswith("(deleted)")]


def fail(fault: str) -> None:
    """Have one rank end, or not come, while the others wait for its part."""
    engines = CopyEngines(None, communication_device(), 4096)
    engines.average_([torch.ones(5)])
    if dist.get_rank() == FAULTY:
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return
    engines.average_([torch.ones(5)])


def refused(kind: str) -> str:
    """Ask for what cannot be; returns the error."""
    place = copy_engines.check_places.__globals__["_place"]
    full = peer_memory_host._create
    try:
        if kind == "disk":
            peer_memory_host._create = lambda _: ("", "OSError: [Errno 28] No space left on device")
        if kind == "hosts":
            name = f"host{dist.get_rank()}"
            copy_engines.check_places.__globals__["_place"] = lambda _: Place(name)
        if kind == "exchange_mb":
            wrap(stack(), "flashddp_ce", exchange_mb=0)
        elif kind == "unequal":
            wrap(stack(), "flashddp_ce", exchange_mb=1 + dist.get_rank())
        elif kind in ("hosts", "disk"):
            wrap(stack(), "flashddp_ce")
        else:
            engines = CopyEngines(None, communication_device(), 4096)
            odd = torch.ones(3, dtype=torch.int32) if kind == "dtype" else torch.ones(4)[::2]
            engines.average_([odd.to(communication_device())])
    except (UsageError, RuntimeError) as error:
        return str(error)
    finally:
        copy_engines.check_places.__globals__["_place"] = place
        peer_memory_host._create = full
    return "no error"
