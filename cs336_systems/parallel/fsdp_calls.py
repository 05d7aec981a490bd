"""What FSDP puts around calls: units open around their roots, layers get inputs of their dtype.

A root's class is replaced by a subclass with its own `__call__`, so that a block compiled in place
(`block.compile()`) is entered from outside of its graph. Layers have plain hooks. They also catch
what passes a root by: a layer that is called by itself, and a gradient that enters a block other
than through its output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        cls = type(root)
        root.__dict__["_fsdp_call"] = functools.partial(self._call_root, root, unit, recompute)
        root.__class__ = type(
            f"FSDP{cls.__name__}", (FSDPRoot, cls), {"__module__": cls.__module__}
        )

    def _attach_layers(self, root: nn.Module, unit: Unit) -> None:
        mine = {id(owner) for flat in unit.flats for owners in flat.owners for owner, _ in owners}
        for layer in root.modules():
            if id(layer) in mine and "_fsdp_layer" not in vars(layer):
                hooks = _LayerHooks(self, unit)
                layer.__dict__["_fsdp_layer"] = hooks
                layer.register_forward_pre_hook(hooks.before, with_kwargs=True)
                layer.register_forward_hook(hooks.after, always_call=True)

    def _call_root(
        self,
        root: nn.Module,
        unit: Unit,
        recompute: bool,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        entry = self.enter(unit, root)
        try:
            if recompute and torch.is_grad_enabled():
                output = checkpoint(call, *args, use_reentrant=False, **kwargs)
            else:
                output = call(*args, **kwargs)
            self._schedule.watch(output, entry)
            return output
        finally:
            self._schedule.leave(entry)

    def enter(self, unit: Unit, module: nn.Module) -> Entry:
        """Open the unit for a call of `module`."""
        if torch.is_grad_enabled():
            self._reductions.expect(unit)
        return self._schedule.enter(unit, module)

    def is_open(self, unit: Unit) -> bool:
        """Whether a layer of the unit may run as it is."""
        return self._schedule.is_open(unit)

    def leave(self, entry: Entry) -> None:
        """Close the unit again."""
        self._schedule.leave(entry)

    def watch(self, output: object, entry: Entry) -> None:
        """Have the unit open again for the backward pass."""
        self._schedule.watch(output, entry)

    def cast(self, value: Any) -> Any:
        """Return a floating tensor in the dtype that is computed in, anything else as it is."""
        dtype = self._compute_dtype
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype)


class _LayerHooks:
    """The hooks of one sharded layer."""

    def __init__(self, calls: Calls, unit: Unit) -> None:
        self._calls = calls
        self._unit = unit
        self._opened: Entry | None = None

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open the unit if no root has, and cast the inputs."""
        if not torch.compiler.is_compiling() and not self._calls.is_open(self._unit):
            self._opened = self._calls.enter(self._unit, layer)
        cast = self._calls.cast
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Watch the output's gradient; close what was opened here."""
        if torch.compiler.is_compiling():
            return
        opened, self._opened = self._opened, None
        entry = opened or self._unit.entry
        if entry is not None:
            self._calls.watch(output, entry)
        if opened is not None:
            self._calls.leave(opened)
