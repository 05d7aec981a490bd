"""An optimizer whose state is spread over the ranks: each keeps it for the parameters it owns.

A step has two phases: every rank updates what it owns, with an optimizer of the wrapped class;
then owners send the updated parameters to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from cs336_systems.errors import bad
from cs336_systems.parallel.agreement import agreed
from cs336_systems.parallel.collectives import Group
from cs336_systems.parallel.optimizer_groups import (
    check_each_once,
    check_group,
    check_groups,
    check_loadable,
    copy_hyperparameters,
    describe_groups,
    hyperparameters,
    stand_ins,
    tensors_of,
)
from cs336_systems.parallel.ownership import assign_owners
from cs336_systems.parallel.parameter_broadcast import ParameterBroadcast
from cs336_systems.parallel.sharded_state import gather_states

_WHERE = "ShardedOptimizer"
# With overlap no message is larger, so that the first layers do not wait for much.
_OVERLAPPED_CHUNK_BYTES = 100 * 2**20


class ShardedOptimizer(Optimizer):
    """Wraps `optimizer_cls` so that each rank of `group` steps, and keeps state for, its own part.

    Gradients must be right on the owner at least. The update of a parameter must depend on nothing
    but that parameter; then results equal the plain optimizer's. With `overlap`, `step` returns
    while parameters are on their way, and who reads one must `wait` for it first, as the modules of
    the `zero1` strategy do. Parameters move into buffers from which they are sent.
    Cost: state for the mean plus at most one parameter; each step sends every parameter once.
    Raises: UsageError or TypeError, on every rank, for parameters that no optimizer takes, that are
        given twice, or that differ between ranks.
    Source: Rajbhandari et al., "ZeRO", stage 1; here a parameter is owned as a whole.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: type[Optimizer],
        group: Group = None,
        *,
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_process_group(group)
        self.group, self.overlap = group, overlap
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.inner: Optimizer | None = None
        self.owner_of: dict[Tensor, int] = {}
        self._inner_args = (optimizer_cls, kwargs)
        self._loads = [0] * self.world_size
        self._full_state: dict[Any, Any] | None = None
        self._constructed = False

        def check() -> tuple[tuple[list[dict[str, Any]], Optimizer], list[str]]:
            groups = check_groups(_WHERE, params)
            template = optimizer_cls(map(stand_ins, groups), **kwargs)
            copy_hyperparameters(template.param_groups, groups)
            lines = [f"optimizer {optimizer_cls.__name__}", f"overlap {overlap}"]
            return (groups, template), lines + describe_groups(groups)

        # The template holds no memory but every group's hyperparameters, also on a rank that owns
        # nothing, and it refuses what the plain optimizer refuses.
        groups, self._template = agreed(_WHERE, check, group)
        chunk_bytes = _OVERLAPPED_CHUNK_BYTES if overlap else None
        self.broadcast = ParameterBroadcast(group, chunk_bytes=chunk_bytes)
        super().__init__(groups, self._template.defaults)
        self._constructed = True
        self._own(self.param_groups)

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order in which a state dict numbers them."""
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on every rank; parameters that have an owner keep it."""
        if not self._constructed:
            super().add_param_group(param_group)
            return

        def check() -> tuple[dict[str, Any], list[str]]:
            new = check_group(_WHERE, param_group)
            check_each_once(_WHERE, [*self.params, *tensors_of(new)])
            self._template.add_param_group(stand_ins(new))
            copy_hyperparameters(self._template.param_groups[-1:], [new])
            return new, describe_groups([new])

        self.wait()
        try:
            new = agreed(_WHERE, check, self.group)
        except Exception:
            del self._template.param_groups[len(self.param_groups) :]
            raise
        super().add_param_group(new)
        self._own(self.param_groups[-1:])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, **kwargs: Any
    ) -> float | None:
        """Update what this rank owns and exchange; `kwargs` go to the wrapped optimizer's step.

        `closure` is called once, on every rank. Returns what it returned.
        """
        self.wait()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._full_state = None
        self._step_owned(kwargs)
        self.broadcast.start()
        if not self.overlap:
            self.wait()
        return loss

    @property
    def pending(self) -> bool:
        """Whether parameters may still be on their way."""
        return self.broadcast.pending

    def wait(self, params: Iterable[Tensor] | None = None) -> None:
        """Have the current stream wait until `params` (all of them when None) are up to date."""
        self.broadcast.wait(params)

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gather the state on rank `to` (on all when None), for `state_dict`; call on every rank.

        Cost: the whole state in CPU memory there, until the next step.
        """
        if to is not None and to not in range(self.world_size):
            raise bad(_WHERE, "to", f"be None or a rank below {self.world_size}", to)
        params = self.params
        numbers: dict[Any, int] = {param: number for number, param in enumerate(params)}
        # Who reads the state of a parameter owned elsewhere leaves an empty entry behind.
        states = {
            numbers.get(key, key): state
            for key, state in self.state.items()
            if self.owner_of.get(key, self.rank) == self.rank
        }
        self._full_state = None
        if (full := gather_states(states, to=to, group=self.group)) is not None:
            in_order = {
                params[number]: full.pop(number)
                for number in sorted(set(full) & set(numbers.values()))
            }
            self._full_state = {**in_order, **full}

    def state_dict(self) -> dict[str, Any]:
        """Return the plain optimizer's state dict, with tensors on the CPU.

        Raises: RuntimeError unless this rank has the whole state as of the last step.
        """
        if self._full_state is None:
            raise RuntimeError(
                f"{_WHERE}: state_dict() must come after consolidate_state_dict(to={self.rank}), "
                "or to=None, on every rank, got none since the state last changed"
            )
        part, self.state = self.state, self._full_state  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what this rank owns from a plain optimizer's state dict; call on every rank.

        Raises: UsageError, before anything has changed, if its groups are not like these.
        """
        self.wait()
        for change in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = change(self, state_dict) or state_dict
        saved, groups = state_dict, self.param_groups
        agreed(_WHERE, lambda: (None, check_loadable(_WHERE, saved, groups)), self.group)
        self._full_state = None
        self._template.load_state_dict({**saved, "state": {}})
        for group, loaded in zip(groups, self._template.param_groups, strict=True):
            for key in hyperparameters(group):
                del group[key]
            group.update(hyperparameters(loaded))
        if self.inner is not None:
            self.inner.load_state_dict(self._owned_state_dict(saved))
            self.state = self.inner.state
        for told in self._optimizer_load_state_dict_post_hooks.values():
            told(self)

    def _own(self, groups: list[dict[str, Any]]) -> None:
        """Give the parameters of new groups to ranks, and those of this rank to its optimizer."""
        params = [param for group in groups for param in group["params"]]
        sizes = [param.numel() * param.element_size() for param in params]
        owners = assign_owners(sizes, self._loads)
        for size, owner in zip(sizes, owners, strict=True):
            self._loads[owner] += size
        self.owner_of.update(zip(params, owners, strict=True))
        self.broadcast.add(params, owners)
        self._full_state = None
        if self.inner is not None:
            for group in groups:
                self.inner.add_param_group(self._owned_part(group))
        elif self.rank in owners:
            # A group of which this rank owns nothing is there, too: groups keep their numbers.
            optimizer_cls, kwargs = self._inner_args
            self.inner = optimizer_cls(map(self._owned_part, self.param_groups), **kwargs)
            self.state = self.inner.state

    def _owned_part(self, group: dict[str, Any]) -> dict[str, Any]:
        owned = [param for param in group["params"] if self.owner_of[param] == self.rank]
        return {**hyperparameters(group), "params": owned}

    def _owned_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the plain optimizer's state dict that fits this rank's own."""
        groups = []
        others: set[Any] = set()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            owners = [self.owner_of[param] for param in group["params"]]
            pairs = list(zip(saved["params"], owners, strict=True))
            owned = [key for key, owner in pairs if owner == self.rank]
            others.update(key for key, owner in pairs if owner != self.rank)
            groups.append({**hyperparameters(group), "params": owned})
        states = {key: state for key, state in state_dict["state"].items() if key not in others}
        return {"state": states, "param_groups": groups}

    def _step_owned(self, kwargs: dict[str, Any]) -> None:
        if self.inner is None:
            return
        copy_hyperparameters(self.param_groups, self.inner.param_groups)
        try:
            self.inner.step(**kwargs)
        except Exception as error:
            error.add_note(f"{_WHERE}: raised on rank {self.rank}, for which the other ranks wait")
            raise
        # Some optimizers count in their groups.
        copy_hyperparameters(self.inner.param_groups, self.param_groups)


def _check_process_group(group: Group) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise bad(_WHERE, "process group", "be initialised (init_process_group)", "none")
    if dist.get_rank(group) < 0:
        raise bad(_WHERE, "group", "contain this rank", f"rank {dist.get_rank()}")
