"""torch's fully_shard behind our methods, to be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.checks import parameters_once
from cs336_systems.parallel.fsdp_plan import plan_units


class TorchFSDP2(DataParallel):
    """torch.distributed.fsdp.fully_shard of every block and of the rest together.

    Raises: UsageError for what it has no counterpart of.
    """

    strategy = "torch_fsdp2"
    compiles_whole = False

    def __init__(
        self,
        module: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
        **options: Any,
    ) -> None:
        if options.get("check_finite"):
            raise UsageError("torch_fsdp2: check_finite must be off, torch has no such check")
        own = {"compute_dtype": compute_dtype, "reshard_after_forward": reshard_after_forward}
        super().__init__(module, own_options=own, **options)
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise bad(self.strategy, "compute_dtype", "be floating", compute_dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=self.communication_dtype
        )
        mesh = self._mesh()
        for plan in plan_units(module):
            for block in plan.blocks:
                fully_shard(
                    block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
                )
        # The rest is used at both ends of the model, so torch keeps it between them.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._parameters_once = parameters_once(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module, which torch has hooked."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up locally."""
        assert isinstance(self.module, FSDPModule)
        was_synchronizing = self._synchronizing
        self.module.set_requires_gradient_sync(False)
        try:
            with super().no_sync():
                yield
        finally:
            self.module.set_requires_gradient_sync(was_synchronizing)

    def finish_gradient_synchronization(self) -> None:
        """Do nothing: torch's backward pass has waited for its reductions."""

    def clip_grad_norm(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`; returns the norm
        before, equal on all ranks."""
        norm = super().clip_grad_norm(max_norm, error_if_nonfinite=error_if_nonfinite)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def full_state_dict(self) -> dict[str, Any]:
        """Return the state with whole tensors, on every rank."""
        return get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True))

    def load_full_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load whole tensors, given to every rank."""
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.module, dict(state), options=options)

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the plain module's optimizer would return, on every rank."""
        packed = optimizer.state_dict()
        state = {
            number: {name: _whole(value) for name, value in values.items()}
            for number, values in packed["state"].items()
        }
        return {**packed, "state": state}

    def load_full_optimizer_state_dict(
        self, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Load this rank's parts of a state with whole tensors."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        local = {
            number: {name: _part(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": local})

    def _mesh(self) -> DeviceMesh:
        if self.group is not None:
            return DeviceMesh.from_group(self.group, self._device.type)
        return DeviceMesh(self._device.type, list(range(self.world_size)))


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, parameter: Tensor) -> Any:
    """Return this rank's part of what has its parameter's shape; anything else as it is."""
    is_like = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    if not (is_like and isinstance(parameter, DTensor)):
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)
