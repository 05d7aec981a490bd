"""A program that forks ranks and kills one of them at every step of a save.

A hundred ranks die in the time in which a pool of fresh processes would start a few.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_ranks import save_in

from cs336_systems.parallel import checkpoint_files

OPERATIONS = ("mkdir", "fsync", "replace", "unlink", "rmdir")
"""Of the module os; with writing, all by which a save changes the disk."""


def fork_ranks(world_size: int, function: Callable[[int], object], rendezvous: Path) -> list[int]:
    """Run `function(rank)` in forks that have a process group; return how each has ended."""
    children = {}
    for rank in range(world_size):
        if (child := os.fork()) == 0:
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=rendezvous.as_uri(),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=30),
                )
                function(rank)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children[child] = rank
    ends = [0] * world_size
    while children:
        pid, status = os.wait()
        ends[children.pop(pid)] = os.waitstatus_to_exitcode(status)
    return ends


def die_at(number: int, log: Path) -> None:
    """Arrange that this process is killed before its operation `number`, which is noted."""
    calls = [0]

    def watched(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Of the many small writes of one file, those of names and padding are left out.
            calls[0] += name != "write" or len(args[1]) > 64
            if calls[0] == number:
                log.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name), name))
    file = checkpoint_files.HashedFile
    file.write = watched(file.write, "write")  # type: ignore[method-assign]


def kill_everywhere(base: Path, world_size: int, victim: int) -> None:
    """Leave a folder for each step of a third save at which rank `victim` was killed."""
    template = base / "template"

    def save_two(rank: int) -> None:
        save_in([str(template)], 1)
        save_in([str(template)], 2)

    assert fork_ranks(world_size, save_two, base / "rendezvous") == [0] * world_size
    number, ends = 0, [1]
    while any(ends):
        number += 1
        folder, log = base / f"{number:03d}", base / f"{number:03d}.operation"
        shutil.copytree(template, folder)

        def save_third(rank: int) -> None:
            if rank == victim:
                die_at(number, log)  # noqa: B023
            save_in([str(folder)], 3)  # noqa: B023

        begin = time.monotonic()
        ends = fork_ranks(world_size, save_third, base / f"{number:03d}.rendezvous")
        assert time.monotonic() - begin < 10
        assert ends[victim] in (0, -signal.SIGKILL)
        assert set(ends) <= {0, 1, -signal.SIGKILL}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_everywhere(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
