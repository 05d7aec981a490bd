"""What ranks run for the tests of times taken on several ranks; imports no pytest."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from all_reduce_ranks import check_sum, random_terms

from cs336_systems.measure.ranks import time_on_rank

CPU = torch.device("cpu")


def timed_sleeps(
    seconds_by_rank: tuple[float, ...], rounds: int, warmup_rounds: int, max_seconds: float
) -> tuple[list[float], list[str]]:
    """Time a rank's own sleep; returns the times and what was called in order."""
    calls: list[str] = []

    def step() -> None:
        calls.append("step")
        time.sleep(seconds_by_rank[dist.get_rank()])

    limits = {"rounds": rounds, "warmup_rounds": warmup_rounds, "max_seconds": max_seconds}
    seconds = time_on_rank(step, CPU, setup=lambda: calls.append("setup"), **limits)
    return seconds, calls


def late_setup(seconds: float) -> list[float]:
    """Time nothing after rank 1 alone has prepared for a while."""

    def setup() -> None:
        time.sleep(seconds * dist.get_rank())

    return time_on_rank(lambda: None, CPU, rounds=3, warmup_rounds=0, max_seconds=9.0, setup=setup)


def spoiled_sum(rank: int) -> None:
    """Check a sum that is wrong in one element on one rank."""
    terms = random_terms(100, CPU)
    message = terms * 3
    message[99] += 1.0 if dist.get_rank() == rank else 0.0
    check_sum(message, terms)
