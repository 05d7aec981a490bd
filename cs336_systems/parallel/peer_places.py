"""Can all ranks of a group reach each other's memory? Asked once, with one answer for all."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.collectives import Group, all_gather_object

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_DRIVER = "cuda.bindings"


@dataclass(frozen=True)
class Place:
    """Where a rank is, and whose memory it can reach."""

    host: str
    gpu: str | None = None
    """The GPU's own name; None on the CPU."""
    reached: frozenset[str] = frozenset()
    """The GPUs whose memory this one can map."""
    has_driver: bool = True


def check_places(group: Group, device: torch.device, where: str) -> None:
    """Check that all ranks are on one host, on GPUs of their own that reach each other.

    Cost: one gathered object.
    Raises: UsageError with the same text on every rank.
    """
    places = all_gather_object(_place(device), group)
    if (problem := find_problem(places, where)) is not None:
        raise problem


def find_problem(places: Sequence[Place], where: str) -> UsageError | None:
    """Return what is wrong with the places of all ranks, by rank."""
    for rank, place in enumerate(places):
        if not place.has_driver:
            rule = "be installed on every rank (pip install cuda-bindings)"
            return bad(where, f"Python package {_DRIVER}", rule, f"none on rank {rank}")
    hosts = [place.host for place in places]
    if len(set(hosts)) > 1:
        return bad(where, "ranks", "be on one host", _by_name(hosts))
    gpus = [place.gpu for place in places if place.gpu is not None]
    if len(set(gpus)) < len(gpus):
        return bad(where, "ranks", "have a GPU each", _by_name(gpus))
    for (rank, place), (other, peer) in permutations(enumerate(places), 2):
        if peer.gpu is not None and peer.gpu not in place.reached:
            rule = "see and access each other's memory (peer access)"
            return bad(where, "GPUs", rule, f"no access from rank {rank} to rank {other}")
    return None


def _place(device: torch.device) -> Place:
    host = socket.gethostname()
    if _BOOT.exists():  # Hosts may share a name.
        host += f" {_BOOT.read_text().strip()}"
    if device.type != "cuda":
        return Place(host)
    own = torch.cuda.current_device() if device.index is None else device.index
    names = [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]
    reached = frozenset(
        name
        for other, name in enumerate(names)
        if other != own and torch.cuda.can_device_access_peer(own, other)
    )
    return Place(host, names[own], reached, _has_driver())


def _has_driver() -> bool:
    try:
        return importlib.util.find_spec(f"{_DRIVER}.driver") is not None
    except ModuleNotFoundError:
        return False


def _by_name(names: Sequence[str]) -> str:
    """Say which ranks have which name."""
    found = []
    for name in dict.fromkeys(names):
        ranks = [str(rank) for rank, other in enumerate(names) if other == name]
        found.append(f"{name} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}")
    return "; ".join(found)
