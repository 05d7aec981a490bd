"""Which all-reduces are run by default, and what the command line chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from choices import at_least, listed, one_of

from cs336_systems.measure.memory import available_bytes, gib
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import NotMeasured

BACKENDS = ("gloo", "nccl")
MEGABYTE = 10**6
WARMUP_ROUNDS = 5
NCCL_ROUNDS = 50
_TENSORS = 3
"""Of a message's size on each rank: its terms, the message, and what the check compares with."""

Option = Callable[[str], Any]


class Exchange(NamedTuple):
    """One all-reduce."""

    backend: str
    processes: int
    megabytes: int

    @property
    def num_bytes(self) -> int:
        """The message's size."""
        return self.megabytes * MEGABYTE

    def case(self) -> Case:
        """Return what is recorded of it."""
        return Case(
            study="all_reduce",
            params=self._asdict(),
            rounds=NCCL_ROUNDS if self.backend == "nccl" else None,
            warmup_rounds=WARMUP_ROUNDS,
        )

    def refuse_what_cannot_run(self) -> None:
        """Raise NotMeasured where devices or memory are missing."""
        found = torch.cuda.device_count()
        if self.backend == "nccl" and found < self.processes:
            plural = "" if self.processes == 1 else "s"
            reason = f"nccl: needs {self.processes} CUDA device{plural}, found {found}"
            raise NotMeasured("skipped", reason)
        # Ranks of gloo share the host's memory; NCCL's have a device each.
        on_gpu = self.backend == "nccl"
        need = _TENSORS * self.num_bytes * (1 if on_gpu else self.processes)
        have = available_bytes(torch.device("cuda" if on_gpu else "cpu"))
        if have is not None and need > have:
            reason = f"predicted: needs at least {gib(need)}, there are {gib(have)}"
            raise NotMeasured("oom", reason, predicted_bytes=need)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that are run."""

    backends: tuple[str, ...]
    processes: tuple[int, ...]
    megabytes: tuple[int, ...]

    def exchanges(self) -> list[Exchange]:
        """Return them, ranks that are there already before others."""
        return [
            Exchange(backend, processes, megabytes)
            for backend in self.backends
            for processes in self.processes
            for megabytes in self.megabytes
        ]


def default_grid(device: torch.device, *, smoke: bool) -> Grid:
    """Return the handout's grid; without a GPU, what takes seconds."""
    if device.type == "cuda" and not smoke:
        return Grid(backends=BACKENDS, processes=(2, 4, 6), megabytes=(1, 10, 100, 1000))
    return Grid(backends=BACKENDS, processes=(2,), megabytes=(1,) if smoke else (1, 10, 100))


def add_options(group: pytest.OptionGroup) -> None:
    """Register the options that choose all-reduces."""
    group.addoption("--backends", help=f"all-reduce: {', '.join(BACKENDS)}")
    group.addoption("--processes", help="all-reduce: numbers of ranks, e.g. 2,4,6")
    group.addoption("--megabytes", help="all-reduce: message sizes, e.g. 1,10,100,1000")


def chosen_grid(option: Option, device: torch.device, *, smoke: bool) -> Grid:
    """Return the grid that the command line chooses.

    Raises: UsageError for a value that is not a choice.
    """
    default = default_grid(device, smoke=smoke)

    def chosen(key: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
        fallback: Sequence[Any] = getattr(default, key)
        return listed(option(key), f"--{key}", fallback, parse)

    return Grid(
        backends=chosen("backends", one_of("--backends", BACKENDS)),
        processes=chosen("processes", at_least("--processes", 1)),
        megabytes=chosen("megabytes", at_least("--megabytes", 1)),
    )
