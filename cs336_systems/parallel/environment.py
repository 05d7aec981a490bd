"""One path into a process group, for a program under torchrun and for one that runs alone."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cs336_systems.errors import UsageError, bad, unknown

_WHERE = "init_from_environment"
_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STORE_NAMES = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among all ranks, and the device that is its own."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


@contextlib.contextmanager
def init_from_environment(backend: str | None = None) -> Iterator[RankInfo]:
    """Set up the default process group that torchrun's variables describe, or one of a single rank
    without them; NCCL on GPUs and gloo on CPUs, unless `backend` says otherwise.

    One of several ranks that raises ends its process at once, since to leave the group in order it
    would wait for peers that wait for it; torchrun then ends the others.

    Raises: UsageError when some of the variables are missing or name what is not there.
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    info = _rank_info(os.environ, backend)
    device = info.device if info.device.type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    with _rendezvous(is_alone="RANK" not in os.environ) as init_method:
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=info.rank,
            world_size=info.world_size,
            device_id=device,
        )
        try:
            yield info
        except Exception:
            if info.world_size > 1:
                _leave_at_once()
            raise
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _rendezvous(is_alone: bool) -> Iterator[str]:
    if not is_alone:
        yield "env://"
        return
    with tempfile.TemporaryDirectory(prefix="cs336-rank-") as folder:
        yield (Path(folder) / "rendezvous").as_uri()


def _rank_info(variables: Mapping[str, str], backend: str) -> RankInfo:
    if backend not in ("gloo", "nccl"):
        raise unknown(_WHERE, "backend", ("gloo", "nccl"), backend)
    rank, world_size, local_rank = _ranks(variables)
    if backend == "gloo":
        return RankInfo(rank, world_size, local_rank, torch.device("cpu"))
    found = torch.cuda.device_count()
    if local_rank >= found:
        rule = f"name one of the {found} CUDA devices here, counted from 0"
        raise bad(_WHERE, "LOCAL_RANK", rule, local_rank)
    return RankInfo(rank, world_size, local_rank, torch.device("cuda", local_rank))


def _ranks(variables: Mapping[str, str]) -> tuple[int, int, int]:
    if not any(name in variables for name in _RANK_NAMES):
        return 0, 1, 0
    wanted = (*_RANK_NAMES, *_STORE_NAMES)
    if missing := [name for name in wanted if name not in variables]:
        there = ", ".join(name for name in wanted if name in variables)
        raise UsageError(
            f"{_WHERE}: torchrun sets all of {', '.join(wanted)}, got only {there}; "
            f"missing {', '.join(missing)}"
        )
    rank, world_size, local_rank = (_count(variables, name) for name in _RANK_NAMES)
    if rank >= world_size:
        raise bad(_WHERE, "RANK", f"be below WORLD_SIZE={world_size}", rank)
    return rank, world_size, local_rank


def _count(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not (text.isascii() and text.isdigit()):
        raise bad(_WHERE, name, "be a number from 0 on", text)
    return int(text)


def _leave_at_once() -> None:
    traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)
