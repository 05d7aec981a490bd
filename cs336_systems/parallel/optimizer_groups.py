"""Groups of parameters as users write them, and as two optimizers share them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cs336_systems.errors import bad

_NOT_HYPERPARAMETERS = ("params", "param_names")


def check_groups(where: str, params: Any) -> list[dict[str, Any]]:
    """Return parameters, named ones too, or groups of them as a list of new groups.

    Raises: TypeError for what is no collection of tensors; UsageError for one that is empty, holds
        a tensor twice or holds what no optimizer can change.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        rule = "be an iterable of tensors or of dicts with params"
        raise TypeError(str(bad(where, "params", rule, type(params).__name__)))
    items = list(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    groups = [check_group(where, item) for item in items]
    if not any(group["params"] for group in groups):
        raise bad(where, "params", "hold a parameter", items)
    check_each_once(where, [param for group in groups for param in tensors_of(group)])
    return groups


def check_group(where: str, group: Any) -> dict[str, Any]:
    """Return one group of parameters, named or not, as a new dict with a list.

    Raises: as `check_groups`.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(
            str(bad(where, "param group", "be a dict with params", type(group).__name__))
        )
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(str(bad(where, "params", "be ordered, the same on every rank", "set")))
    new = {**group, "params": [params] if isinstance(params, Tensor) else list(params)}
    for param in tensors_of(new):
        _check_param(where, param)
    return new


def check_each_once(where: str, params: list[Tensor]) -> None:
    """Check that no parameter occurs twice: two owners would overwrite each other's updates.

    Raises: UsageError.
    """
    seen: dict[Any, int] = {}
    for index, param in enumerate(params):
        keys = [id(param)] + ([(param.device, param.data_ptr())] if param.numel() > 0 else [])
        for key in keys:
            if (first := seen.setdefault(key, index)) != index:
                shape = tuple(param.shape)
                got = f"number {index} of shape {shape}, which is number {first} again"
                raise bad(where, "params", "be given once each, tied ones too", got)


def tensors_of(group: dict[str, Any]) -> list[Tensor]:
    """Return a group's parameters without their names."""
    return [item[1] if isinstance(item, tuple) else item for item in group["params"]]


def stand_ins(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with parameters of the same kinds that take no memory."""
    params = [
        torch.nn.Parameter(p.detach().new_empty((0,) * p.ndim), requires_grad=p.requires_grad)
        for p in tensors_of(group)
    ]
    return {**hyperparameters(group), "params": params}


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group holds beside its parameters."""
    return {key: value for key, value in group.items() if key not in _NOT_HYPERPARAMETERS}


def copy_hyperparameters(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """Make every group of `target` agree with that of `source` in all but parameters."""
    if len(source) != len(target):
        rule = f"be {len(target)} as added by add_param_group"
        raise bad("ShardedOptimizer", "number of param_groups", rule, len(source))
    for from_group, to_group in zip(source, target, strict=True):
        to_group.update(hyperparameters(from_group))


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """Return lines that are equal on two ranks if their groups fit one another."""
    lines = []
    for index, group in enumerate(groups):
        lines.append(f"group {index} with {', '.join(sorted(hyperparameters(group)))}")
        for number, param in enumerate(tensors_of(group)):
            shape, dtype = tuple(param.shape), str(param.dtype).removeprefix("torch.")
            kind = "trainable" if param.requires_grad else "frozen"
            lines.append(f"group {index} parameter {number} {shape} {dtype} {kind}")
    return lines


def check_loadable(where: str, state_dict: Any, groups: list[dict[str, Any]]) -> list[str]:
    """Return lines that are equal on two ranks that load the same.

    Raises: UsageError for what is no state dict of an optimizer with groups of the same sizes.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise bad(where, "state_dict", "be a dict with state and param_groups", state_dict)
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != saved_sizes:
        raise bad(where, "state_dict", f"have groups of {sizes} parameters", saved_sizes)
    known = {number for group in state_dict["param_groups"] for number in group["params"]}
    if foreign := [key for key in state_dict["state"] if isinstance(key, int) and key not in known]:
        rule = "hold state of its groups' parameters alone"
        raise bad(where, "state_dict", rule, f"state of parameter {foreign[0]}")
    return [f"state of parameter {key}" for key in state_dict["state"]]


def _check_param(where: str, param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(str(bad(where, "params", "be tensors", type(param).__name__)))
    if not param.is_leaf:
        raise bad(where, "params", "be leaf tensors", f"{tuple(param.shape)} with a grad_fn")
    if param.layout != torch.strided:
        raise bad(where, "params", "be dense", str(param.layout))
