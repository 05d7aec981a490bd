"""What FSDP shards, and which weights travel together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from cs336_basics.layers import Embedding, Linear
from torch import nn

from cs336_systems.errors import bad

_LINEAR = (nn.Linear, Linear)
_EMBEDDING = (nn.Embedding, Embedding)
T = TypeVar("T")

_SHARDED_NAMES = ("weight", "bias")
# It reads the weights of the layer inside it without calling that layer.
_READS_ITS_LAYERS = (nn.MultiheadAttention,)


@dataclass
class Weight:
    """A parameter that is sharded, and every place of the model that holds it."""

    parameter: nn.Parameter
    names: list[str]
    owners: list[tuple[nn.Module, str]]


@dataclass
class UnitPlan:
    """Weights that are gathered together when one of the roots runs."""

    name: str
    roots: list[nn.Module]
    weights: list[Weight]
    blocks: list[nn.Module]
    """Those of the roots that are children of an `nn.ModuleList`."""


def is_sharded_layer(module: nn.Module) -> bool:
    """Tell whether the module's own weights are sharded."""
    return isinstance(module, _LINEAR + _EMBEDDING)


def needs_weights_in_backward(root: nn.Module) -> bool:
    """Tell whether the backward pass of `root` reads weights; that of an embedding only writes."""
    return not isinstance(root, _EMBEDDING)


def plan_units(module: nn.Module) -> list[UnitPlan]:
    """Divide the weights of the module's linear and embedding layers into units.

    Each child of an `nn.ModuleList` is a unit, every layer outside of one is its own. Roots that
    share a tied weight make one unit. A parameter that another kind of module holds too is left
    out.
    Raises: UsageError for an embedding whose gradient or forward pass cannot be sharded.
    """
    weights = _find_weights(module)
    plans: list[UnitPlan] = []
    for name, root, is_block in _find_roots(module, "", in_list=False):
        mine = list(_weights_below(root, weights))
        if not mine:
            continue
        plan = UnitPlan(name, [root], mine, blocks=[root] if is_block else [])
        tied = [other for other in plans if _share_a_weight(other.weights, mine)]
        for other in reversed(tied):
            plan = _merged(other, plan)
        place = plans.index(tied[0]) if tied else len(plans)
        plans = [other for other in plans if not any(other is one for one in tied)]
        plans.insert(place, plan)
    return plans


def _find_weights(module: nn.Module) -> dict[int, Weight]:
    weights: dict[int, Weight] = {}
    excluded: set[int] = set()
    for prefix, layer in module.named_modules(remove_duplicate=False):
        _check_layer(prefix, layer)
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if not (is_sharded_layer(layer) and name in _SHARDED_NAMES):
                excluded.add(id(parameter))
            weight = weights.setdefault(id(parameter), Weight(parameter, [], []))
            weight.names.append(f"{prefix}.{name}" if prefix else name)
            if not any(owner is layer and attribute == name for owner, attribute in weight.owners):
                weight.owners.append((layer, name))
    return {key: weight for key, weight in weights.items() if key not in excluded}


def _check_layer(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Embedding):
        if layer.sparse:
            raise bad("FSDP", f"embedding {name!r}", "have dense gradients", "sparse=True")
        if layer.max_norm is not None:
            # It rescales rows of the gathered copy, which the shards would never learn of.
            raise bad("FSDP", f"embedding {name!r}", "have no max_norm", layer.max_norm)


def _find_roots(
    module: nn.Module, name: str, *, in_list: bool
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the outermost modules whose call gathers weights, and whether they are blocks."""
    # Neither kind of container is ever called itself.
    is_container = isinstance(module, nn.ModuleList | nn.ModuleDict)
    if not is_container and (
        in_list or is_sharded_layer(module) or isinstance(module, _READS_ITS_LAYERS)
    ):
        yield name, module, in_list
        return
    in_list = isinstance(module, nn.ModuleList) or (is_container and in_list)
    for child_name, child in module.named_children():
        yield from _find_roots(child, f"{name}.{child_name}".lstrip("."), in_list=in_list)


def _weights_below(root: nn.Module, weights: dict[int, Weight]) -> Iterator[Weight]:
    return (weights[id(p)] for p in root.parameters() if id(p) in weights)


def _share_a_weight(some: list[Weight], others: list[Weight]) -> bool:
    return not {id(weight) for weight in some}.isdisjoint(id(weight) for weight in others)


def _merged(first: UnitPlan, second: UnitPlan) -> UnitPlan:
    return UnitPlan(
        first.name,
        _once(first.roots + second.roots),
        _once(first.weights + second.weights),
        _once(first.blocks + second.blocks),
    )


def _once(items: list[T]) -> list[T]:
    return list({id(item): item for item in items}.values())
