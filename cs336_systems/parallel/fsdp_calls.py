"""What FSDP puts around calls: units open around their roots, layers get inputs of their dtype.

The classes of roots and layers are replaced by subclasses, not hooked: a root's `__call__` is
outside of the graph when it is compiled in place (`block.compile()`), and blocks of one class share
one graph, since torch.compile tells hooks apart but not instances.

Layers also catch what passes a root by: a layer that is called by itself, and a gradient that
enters a block other than through its output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_systems.parallel.fsdp_reduce import Reductions
from cs336_systems.parallel.fsdp_schedule import Schedule
from cs336_systems.parallel.fsdp_trace import Entry
from cs336_systems.parallel.fsdp_unit import Unit


class FSDPRoot(nn.Module):
    """First base of every root's class."""

    _fsdp_call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_call(super().__call__, args, kwargs)


class FSDPLayer(nn.Module):
    """First base of every sharded layer's class."""

    _fsdp_calls: Calls
    _fsdp_unit: Unit
    _fsdp_compute_dtype: torch.dtype | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._fsdp_compute_dtype is not None:
            args = tuple(_cast(value, self._fsdp_compute_dtype) for value in args)
            kwargs = {name: _cast(v, self._fsdp_compute_dtype) for name, v in kwargs.items()}
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        return self._fsdp_calls.call_layer(self, self._fsdp_unit, super().forward, args, kwargs)


def _derive(module: nn.Module, first: type[nn.Module]) -> None:
    """Give the module a subclass of its class with the methods of `first`."""
    cls: Any = type(module)
    module.__class__ = _subclass(first.__name__, cls)


@functools.cache
def _subclass(first: str, cls: Any) -> Any:
    """Return one and the same class for all modules of a class."""
    bases = ({"FSDPRoot": FSDPRoot, "FSDPLayer": FSDPLayer}[first], cls)
    return type(f"FSDP{cls.__name__}", bases, {"__module__": cls.__module__})


class Calls:
    """The hooks of one wrapped module, and what they work on."""

    def __init__(
        self, schedule: Schedule, reductions: Reductions, compute_dtype: torch.dtype | None
    ) -> None:
        self._schedule = schedule
        self._reductions = reductions
        self._compute_dtype = compute_dtype

    def attach(self, root: nn.Module, unit: Unit, *, recompute: bool) -> None:
        """Open `unit` around every call of `root`; with `recompute` its activations are not kept
        for the backward pass."""
        self._attach_layers(root, unit)
        root.__dict__["_fsdp_call"] = functools.partial(self._call_root, root, unit, recompute)
        _derive(root, FSDPRoot)

    def _attach_layers(self, root: nn.Module, unit: Unit) -> None:
        mine = {id(owner) for flat in unit.flats for owners in flat.owners for owner, _ in owners}
        for layer in root.modules():
            if id(layer) in mine and not isinstance(layer, FSDPLayer):
                layer.__dict__["_fsdp_calls"] = self
                layer.__dict__["_fsdp_unit"] = unit
                layer.__dict__["_fsdp_compute_dtype"] = self._compute_dtype
                _derive(layer, FSDPLayer)

    def _call_root(
        self,
        root: nn.Module,
        unit: Unit,
        recompute: bool,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self._open(unit, root) as entry:
            if recompute and torch.is_grad_enabled():
                output = checkpoint(call, *args, use_reentrant=False, **kwargs)
            else:
                output = call(*args, **kwargs)
            self._schedule.watch(output, entry)
            return output

    def call_layer(
        self,
        layer: nn.Module,
        unit: Unit,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a layer's own forward, in its unit if that is not open."""
        if not self._schedule.is_open(unit):
            with self._open(unit, layer):
                return self.call_layer(layer, unit, call, args, kwargs)
        output = call(*args, **kwargs)
        if unit.entry is not None:
            self._schedule.watch(output, unit.entry)
        return output

    @contextmanager
    def _open(self, unit: Unit, module: nn.Module) -> Iterator[Entry]:
        if torch.is_grad_enabled():
            self._reductions.expect(unit)
        entry = self._schedule.enter(unit, module)
        try:
            yield entry
        finally:
            self._schedule.leave(entry)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value
