"""Times of work that several ranks do together: each rank takes its own, the slowest counts.

The parent process runs pytest and no rank; it replays the ranks' times through
`Workload.replay_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from cs336_systems.errors import bad
from cs336_systems.measure.clock import WallClock, synchronizer

_LEAST_ROUNDS = 3


def time_on_rank(
    step: Callable[[], object],
    device: torch.device,
    *,
    rounds: int,
    warmup_rounds: int,
    max_seconds: float,
    setup: Callable[[], object] | None = None,
) -> list[float]:
    """Run `step` on this rank, at the same time as on all others, and return the seconds of each
    timed round.

    Before each round come `setup`, the device's end of it, and a barrier. Rounds are as many on
    every rank: fewer than `rounds` where the slowest would take longer than `max_seconds`.
    Its own messages are no part of what is measured, and `parallel.collectives` does not see them.
    """
    clock = WallClock(synchronizer(device))

    def run_once() -> float:
        if setup is not None:
            setup()
        clock()
        dist.barrier()
        begin = clock()
        step()
        return clock() - begin

    warmup_seconds = [run_once() for _ in range(warmup_rounds)]
    if warmup_seconds:
        seconds = torch.tensor(warmup_seconds[-1], device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        affordable = int(max_seconds / max(seconds.item(), 1e-9))
        rounds = min(rounds, max(affordable, _LEAST_ROUNDS))
    return [run_once() for _ in range(rounds)]


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Return for each round the time of the rank that took longest.

    Raises: UsageError unless all ranks timed as many rounds.
    """
    if len({len(seconds) for seconds in by_rank}) != 1:
        counts = [len(seconds) for seconds in by_rank]
        raise bad("slowest", "ranks", "have timed equally many rounds", counts)
    return [max(together) for together in zip(*by_rank, strict=True)]
