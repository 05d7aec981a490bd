"""What each rank of the all-reduce benchmark runs; imports no pytest."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from cs336_systems.measure.device import device_facts
from cs336_systems.measure.ranks import time_on_rank
from cs336_systems.parallel.collectives import (
    Collective,
    all_reduce,
    communication_device,
    record_collectives,
)

FP32_BYTES = 4
_LARGEST_TERM = 8


class RankResult(NamedTuple):
    """What one rank has to tell."""

    seconds: list[float]
    device_name: str
    call: Collective


def all_reduce_rounds(
    num_bytes: int, rounds: int, warmup_rounds: int, max_seconds: float
) -> RankResult:
    """Check one all-reduce of random fp32 numbers, then time others like it.

    Raises: AssertionError where the sum is wrong.
    """
    device = communication_device()
    terms = random_terms(num_bytes // FP32_BYTES, device)
    message = torch.empty_like(terms)

    def fill() -> None:
        torch.mul(terms, dist.get_rank() + 1, out=message)

    with record_collectives() as log:
        fill()
        all_reduce(message)
    check_sum(message, terms)
    seconds = time_on_rank(
        lambda: all_reduce(message),
        device,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        max_seconds=max_seconds,
        setup=fill,
    )
    return RankResult(seconds, _name(device), log[0])


def _name(device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else device_facts("cpu")["name"]


def random_terms(numel: int, device: torch.device) -> torch.Tensor:
    """Return whole numbers, the same on every rank, whose sums fp32 holds exactly.

    Random, because a device adds and moves zeros with less power, and so faster.
    """
    generator = torch.Generator(device).manual_seed(0)
    limits = (-_LARGEST_TERM, _LARGEST_TERM + 1)
    return torch.empty(numel, device=device).random_(*limits, generator=generator)


def check_sum(message: torch.Tensor, terms: torch.Tensor) -> None:
    """Check that `message` is the sum of every rank's terms times its number from one on.

    Raises: AssertionError.
    """
    num_ranks = dist.get_world_size()
    factor = num_ranks * (num_ranks + 1) // 2
    assert torch.equal(message, terms * factor), "all-reduce: the sum is wrong"
