"""Run a function on several ranks of this machine, each a process, and get all results back.

Whatever happens in a rank, the caller gets an answer within the limit: results, the traceback of
the rank that failed, or the stacks of the ranks that hang. No ports are used, so any number of
pools and test runs can be at work at once.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from cs336_systems.errors import UsageError, bad, unknown
from cs336_systems.parallel.rank_handle import RankHandle, stacks_of, wait_for_any
from cs336_systems.parallel.rank_process import (
    Failure,
    is_loading_main,
    join_group,
    pack,
    unpack,
)

_BACKENDS = ("gloo", "nccl")
# Importing torch and joining, on a machine that is busy with other tests.
_START_LIMIT_S = 120.0
# How long to look for the cause after a rank felt the fault of another one in a collective.
_GRACE_S = 2.0


class RankFailedError(RuntimeError):
    """A rank raised or died; the message shows its number and its traceback."""

    def __init__(self, rank: int, world_size: int, failure: Failure) -> None:
        self.rank = rank
        self.traceback = failure.traceback
        super().__init__(f"rank {rank} of {world_size}: {failure.summary}\n{failure.traceback}")


class RankTimeoutError(RuntimeError):
    """Ranks gave no answer in time; the message shows what each of them was doing."""

    def __init__(self, stacks: dict[int, str], waited_s: float, echoes: dict[int, Failure]) -> None:
        self.ranks = sorted(stacks)
        names = ", ".join(map(str, self.ranks))
        plural = "" if len(stacks) == 1 else "s"
        lines = [f"rank{plural} {names} gave no answer in {waited_s:.1f} s"]
        lines += [f"rank {rank} meanwhile: {echo.summary}" for rank, echo in echoes.items()]
        lines += [f"stack of rank {rank}:\n{stack}" for rank, stack in sorted(stacks.items())]
        super().__init__("\n".join(lines))


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 60.0,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` once on each of `world_size` fresh ranks.

    Raises: as `RankPool.run`.
    """
    with RankPool(world_size, backend=backend, timeout_s=timeout_s) as pool:
        return pool.run(function, *args, **kwargs)


class RankPool:
    """Ranks that stay alive from call to call, in one default process group.

    Arguments and results are copied; tensors arrive on the CPU. After a failure the next call
    starts with fresh ranks.
    on_start: called on each rank as it starts, for what no call's limit is to be spent on: imports.
    """

    def __init__(
        self,
        world_size: int,
        *,
        backend: str = "gloo",
        timeout_s: float = 60.0,
        on_start: Callable[[], Any] | None = None,
    ) -> None:
        if backend not in _BACKENDS:
            raise unknown("RankPool", "backend", _BACKENDS, backend)
        if world_size < 1:
            raise bad("RankPool", "world_size", "be at least 1", world_size)
        if backend == "nccl" and world_size > torch.cuda.device_count():
            rule = f"be at most the {torch.cuda.device_count()} CUDA devices here"
            raise bad("RankPool", "world_size", rule, world_size)
        if not timeout_s > 0:
            raise bad("RankPool", "timeout_s", "be positive", timeout_s)
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self._on_start = os.getpid if on_start is None else on_start
        self._ranks: list[RankHandle] = []
        self._folder: str | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank and return the results by rank.

        Raises: RankFailedError when a rank raises or dies, RankTimeoutError when one gives no
            answer in time, UsageError when the function cannot be found by its name.
        """
        request = _request(function, args, kwargs)
        if not self._ranks:
            self._start()
        return self._exchange([request] * self.world_size, self.timeout_s)

    def close(self) -> None:
        """End the ranks; a later call starts new ones."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.reap()
        self._ranks = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="cs336-ranks-")
        try:
            for number in range(self.world_size):
                self._ranks.append(RankHandle(number, self._folder, self.backend))
        except BaseException:
            self.close()
            raise
        # A first call, so that no rank's time to join is spent on another one's imports.
        self._exchange([_request(self._on_start, (), {})] * self.world_size, _START_LIMIT_S)
        init_method = (Path(self._folder) / "rendezvous").as_uri()
        joins = [
            _request(
                join_group,
                (self.backend, init_method, number, self.world_size, self.timeout_s / 2),
                {},
            )
            for number in range(self.world_size)
        ]
        self._exchange(joins, _START_LIMIT_S)

    def _exchange(self, requests: list[bytes], limit_s: float) -> list[Any]:
        """Send each rank its request and wait for all answers; no rank is left after a failure."""
        try:
            for rank, request in zip(self._ranks, requests, strict=True):
                rank.send(request)
            payloads = self._collect(limit_s)
        except BaseException:
            self.close()
            raise
        return [unpack(payload) for payload in payloads]

    def _collect(self, limit_s: float) -> list[bytes]:
        begin = time.monotonic()
        deadline = begin + limit_s
        waiting = list(self._ranks)
        payloads: dict[int, bytes] = {}
        failures: dict[int, Failure] = {}
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for rank in wait_for_any(waiting, left_s):
                waiting.remove(rank)
                failure, payloads[rank.number] = rank.receive()
                if failure is not None:
                    failures[rank.number] = failure
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            self._raise_first(
                {number: failure for number, failure in failures.items() if not failure.is_echo}
            )
        if waiting:
            raise RankTimeoutError(stacks_of(waiting), time.monotonic() - begin, failures)
        self._raise_first(failures)
        return [payloads[number] for number in range(self.world_size)]

    def _raise_first(self, failures: dict[int, Failure]) -> None:
        if failures:
            first = min(failures, key=lambda number: failures[number].monotonic_s)
            raise RankFailedError(first, self.world_size, failures[first])


def _request(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    if is_loading_main():
        rule = 'be called under `if __name__ == "__main__":`, since ranks import the program'
        raise UsageError(f"RankPool: run must {rule}")
    if "<" in getattr(function, "__qualname__", ""):
        raise bad("RankPool.run", "function", "be found at the top of a module", function)
    main_name = _main_module_name() if getattr(function, "__module__", "") == "__main__" else None
    return pickle.dumps((main_name, pack((function, args, kwargs))))


def _main_module_name() -> str:
    """Return the name under which ranks can import the program that is being run."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return spec.name
    if (file := getattr(main, "__file__", None)) is not None:
        return Path(file).stem
    raise bad("RankPool.run", "function", "be in a module that ranks can import", "__main__")
