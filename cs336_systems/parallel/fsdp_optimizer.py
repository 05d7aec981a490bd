"""The state of an optimizer of shards, in the form the plain module's optimizer gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cs336_systems.parallel.fsdp_flat import FlatShard
from cs336_systems.parallel.fsdp_state import flats

if TYPE_CHECKING:
    from cs336_systems.parallel.fsdp import FullyShardedDataParallel


@torch.no_grad()
def full_state_dict(model: FullyShardedDataParallel, optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of the optimizer's state with whole tensors.

    What is no tensor of a piece's shape, as a number of steps, is this rank's.
    """
    packed = optimizer.state_dict()
    numbers = _numbers(optimizer)
    state = {number: _copied(values) for number, values in packed["state"].items()}
    for flat in flats(model):
        of_weights = [state.get(numbers.get(id(piece), -1), {}) for piece in flat.pieces]
        for name in sorted({name for values in of_weights for name in values}):
            _collect(flat, name, of_weights)
    return {**packed, "state": state}


def _collect(flat: FlatShard, name: str, of_weights: list[dict[str, Any]]) -> None:
    """Replace one kind of state of all weights in a shard by whole tensors."""
    parts = {
        index: values[name]
        for index, values in enumerate(of_weights)
        if _is_like(values.get(name), flat.pieces[index])
    }
    if not parts:
        return
    shard = torch.zeros(flat.layout.shard_numel, dtype=_dtype(parts), device=flat.shard.device)
    for index, part in parts.items():
        flat.layout.piece(shard, index).copy_(part)
    whole = flat.collect(shard)
    for index in parts:
        of_weights[index][name] = flat.layout.weight(whole, index).clone()


@torch.no_grad()
def load_full_state_dict(
    model: FullyShardedDataParallel, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Load this rank's parts of a state with whole tensors."""
    numbers = _numbers(optimizer)
    local = {number: dict(values) for number, values in state["state"].items()}
    for flat in flats(model):
        for index, piece in enumerate(flat.pieces):
            values = local.get(numbers.get(id(piece), -1), {})
            start, stop = flat.layout.ranges[index]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == flat.layout.shapes[index]:
                    values[name] = value.reshape(-1)[start:stop].clone()
    optimizer.load_state_dict({**state, "state": local})


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}


def _numbers(optimizer: Optimizer) -> dict[int, int]:
    """Return the number that a state dict gives each parameter, by its identity."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(parameters)}


def _is_like(value: object, piece: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == piece.shape


def _dtype(parts: dict[int, Tensor]) -> torch.dtype:
    return next(iter(parts.values())).dtype
