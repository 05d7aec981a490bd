"""Modules that wait for their own parameters, just before they compute with them.

After a step the first layers can then run while the parameters of later ones are on their way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cs336_systems.parallel.parameter_broadcast import ParameterBroadcast
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer


class ForwardWaits:
    """Hooks on `root` and all modules in it that wait for what overlapping optimizers send.

    A module waits for its own parameters and for those of modules in it that do not wait on their
    own: because they have never been called (a parent may read their parameters instead of calling
    them) or because they are compiled. Saving, loading and copying modules waits as well.
    """

    def __init__(self, root: nn.Module) -> None:
        self._broadcasts: list[tuple[weakref.ref[ShardedOptimizer], ParameterBroadcast]] = []
        self._called: set[nn.Module] = set()
        for module in root.modules():
            if next(module.parameters(), None) is None:
                continue
            before = self._before_root if module is root else self._before_forward
            # In front of hooks that compute a weight from parameters.
            module.register_forward_pre_hook(before, prepend=True)
            module.register_state_dict_pre_hook(self._before_access)
            module.register_load_state_dict_pre_hook(self._before_access)

    def add(self, optimizer: ShardedOptimizer) -> None:
        """Wait for the parameters of `optimizer` from now on, even if it is thrown away."""
        self._broadcasts = [
            (owner, broadcast)
            for owner, broadcast in self._broadcasts
            if owner() is not None or broadcast.pending
        ]
        self._broadcasts.append((weakref.ref(optimizer), optimizer.broadcast))

    # Compiled code must not carry on without it.
    @torch.compiler.disable
    def wait_for_all(self) -> None:
        """Have the current stream wait until every parameter is up to date."""
        for _, broadcast in self._broadcasts:
            broadcast.wait()

    def _before_root(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.wait_for_all()
        else:
            self._before_forward(module, args)

    def _before_forward(self, module: nn.Module, _args: Any) -> None:
        # In a compiled region, whatever encloses the region has waited.
        if torch.compiler.is_compiling():
            return
        self._called.add(module)
        for _, broadcast in self._broadcasts:
            if broadcast.pending:
                broadcast.wait(self._read_by(module))

    def _before_access(self, module: nn.Module, *_args: Any) -> None:
        for _, broadcast in self._broadcasts:
            broadcast.wait(_own_parameters(module))

    def _read_by(self, module: nn.Module) -> Iterator[Tensor]:
        """Iterate over the parameters in `module` for which nobody in it will wait."""
        if "_orig_mod" in module._modules:  # The result of torch.compile(module).
            yield from module.parameters()
            return
        yield from _own_parameters(module)
        for child in module._modules.values():
            if child is None:
                continue
            if child._compiled_call_impl is not None:
                yield from child.parameters()
            elif child not in self._called:
                yield from self._read_by(child)

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy of a module hooks that have nothing to wait for."""
        self.wait_for_all()
        return {"_broadcasts": [], "_called": set()}


def _own_parameters(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]
