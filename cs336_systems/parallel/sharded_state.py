"""An optimizer's state from where its parameters are owned to where it is wanted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel.collectives import (
    Group,
    all_gather_object,
    broadcast,
    communication_device,
)


@dataclass(frozen=True)
class _Slot:
    """A tensor's place in a state whose tensors travel on their own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_states(
    states: Mapping[Any, Any], *, to: int | None, group: Group
) -> dict[Any, Any] | None:
    """Return the states of all ranks together, tensors on the CPU, on rank `to` (all when None).

    `states` are this rank's own, by a key that names the parameter on every rank. A key that
    several ranks have is taken from the first. Elsewhere than on `to` the result is None.
    Cost: beyond the result, one tensor of state at a time.
    """
    rank = dist.get_rank(group)
    wanted = to is None or to == rank
    skeletons: dict[Any, tuple[int, Any]] = {}
    parts = all_gather_object(_map(dict(states), Tensor, _slot), group)
    for owner, part in enumerate(parts):
        for key, skeleton in part.items():
            skeletons.setdefault(key, (owner, skeleton))
    gathered = {}
    for key, (owner, skeleton) in skeletons.items():
        own = _large_tensors(states[key]) if owner == rank else None
        state = _map(skeleton, _Slot, functools.partial(_send, own, owner, group))
        if wanted:
            gathered[key] = _map(state, Tensor, Tensor.cpu)
    return gathered if wanted else None


def _send(own: Iterator[Tensor] | None, owner: int, group: Group, slot: _Slot) -> Tensor:
    """Return the tensor that belongs into `slot`, which is the next of the owner's `own`."""
    device = communication_device(group)
    if own is None:
        tensor = torch.empty(slot.shape, dtype=slot.dtype, device=device)
    else:
        # A copy is a snapshot: later steps do not change it.
        tensor = next(own).detach().to(device, copy=True).contiguous()
    # To all, also where one rank wants it: this kind of collective works on every backend.
    broadcast(tensor.view(-1).view(torch.uint8), group, source=owner)
    return tensor


def _large_tensors(state: Any) -> Iterator[Tensor]:
    tensors: list[Tensor] = []
    _map(state, Tensor, tensors.append)
    return (tensor for tensor in tensors if isinstance(_slot(tensor), _Slot))


def _slot(tensor: Tensor) -> Tensor | _Slot:
    # Step counters and the like are cheaper as part of the description.
    if tensor.numel() <= 1:
        return tensor.detach().cpu().clone()
    return _Slot(tuple(tensor.shape), tensor.dtype)


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to what is of `kind` anywhere in dicts, lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, kind, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, kind, function) for item in value)
    return value
