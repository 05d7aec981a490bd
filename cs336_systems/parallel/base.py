"""What all strategies share: the checks, the first broadcast, the step's protocol, the errors.

A step is: forward and backward of every micro-batch (all but the last in `no_sync()`), then
`finish_gradient_synchronization()`, then clipping and the optimizer. After it, every rank holds the
average of the ranks' gradients, to the bit. A strategy says how in `_reduce` and `_complete`; the
small report that lets all ranks raise or go on together is the same for all of them.

Buffers are rank 0's when a module is wrapped and, if the state dict carries them, again at the
first forward pass of every step; in between each rank keeps the running statistics of its own data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.checks import (
    buffers_once,
    check_group,
    check_structure,
    parameters_once,
)
from cs336_systems.parallel.collectives import Group, averaging, broadcast
from cs336_systems.parallel.layout import in_memory_order, is_dense, without_repeats
from cs336_systems.parallel.report import NonFiniteGradientError, StepReport, Verdict


class DataParallel(nn.Module):
    """Train `module` on several ranks, each with its own part of the batch.

    communication_dtype: what gradients are cast to on the wire.
    find_unused: parameters may be without a gradient on some ranks (the others' average over all
        ranks counts) or on all of them (there is none). Costs a wait for the device in every step.
    check_finite: all ranks raise when one of them has a gradient that is not finite.
    broadcast_buffers: at the first forward pass of each step.
    own_options: what a strategy adds to the options that must be equal on all ranks.
    Raises: UsageError with the same text on every rank.
    """

    strategy: ClassVar[str]
    compiles_whole: ClassVar[bool] = True
    """Whether the module may be compiled as one graph, which what happens between layers breaks."""

    def __init__(
        self,
        module: nn.Module,
        *,
        group: Group = None,
        communication_dtype: torch.dtype | None = None,
        find_unused: bool = False,
        check_finite: bool = False,
        broadcast_buffers: bool = True,
        own_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        check_group(group)
        options = {
            "communication_dtype": communication_dtype,
            "find_unused": find_unused,
            "check_finite": check_finite,
            "broadcast_buffers": broadcast_buffers,
            **(own_options or {}),
        }
        self.own_options: dict[str, Any] = dict(own_options or {})
        if communication_dtype is not None and not communication_dtype.is_floating_point:
            raise bad(self.strategy, "communication_dtype", "be floating", communication_dtype)
        check_structure(module, self.strategy, options, group)
        self.module = module
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.communication_dtype = communication_dtype
        self.find_unused, self.check_finite = find_unused, check_finite
        self.num_skipped_steps = 0
        self._parameters_once = parameters_once(module)
        self._was_trainable = [p.requires_grad for p in self._parameters_once.values()]
        self._device = next(module.parameters()).device
        self._average_op, self._divisor = averaging(group, self._device)
        self._reads_late = self._device.type == "cuda" and not (find_unused or check_finite)
        self._synchronizing = True
        self._num_synchronized = 0
        self._largest: list[Tensor] = []
        self._report = StepReport(
            len(self._parameters_once), group, self._device, check_finite=check_finite
        )
        self._running_buffers = _saved_buffers(module) if broadcast_buffers else []
        self._buffers_due = False
        self._broadcast([*self._parameters_once.values(), *buffers_once(module).values()])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module."""
        if torch.is_grad_enabled():
            self._start_forward()
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up locally; for the forward and backward of all but the last
        micro-batch."""
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    def finish_gradient_synchronization(self) -> None:
        """Make every gradient the ranks' average; call it after backward, before clipping.

        Raises: UsageError where a parameter has no gradient (without find_unused) or was frozen or
            thawed since it was wrapped, NonFiniteGradientError (with check_finite); on all ranks
            alike. On a GPU without both options, the first step's report is read at once and a
            later one's at the next call, so that no step waits for the device.
        """
        if not self._synchronizing:
            raise UsageError(f"{self.strategy}: no_sync() must be left before gradients are synced")
        self._synchronize()
        self._num_synchronized += 1
        if not self._reads_late or self._num_synchronized == 1:
            self._judge(self._report.read())

    def clip_grad_norm(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`; returns the norm
        before, equal on all ranks."""
        if self._is_unfinished():
            raise UsageError(
                f"{self.strategy}: finish_gradient_synchronization must be called before clipping"
            )
        return torch.nn.utils.clip_grad_norm_(
            self._parameters_once.values(), max_norm, error_if_nonfinite=error_if_nonfinite
        )

    def build_optimizer(
        self, optimizer_cls: type[Optimizer], params: Any = None, **kwargs: Any
    ) -> Optimizer:
        """Make the optimizer of `params` (tensors or groups), or of all that is trainable."""
        return optimizer_cls(list(self._trainable()) if params is None else params, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the wrapped module's state under the wrapped module's names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` of this or of the plain module gave."""
        return self.module.load_state_dict(*args, **kwargs)

    def full_state_dict(self) -> dict[str, Any]:
        """Return the state with whole tensors, on every rank."""
        return self.state_dict()

    def load_full_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `full_state_dict` of any strategy gave, on every rank."""
        self.load_state_dict(state)

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the plain module's optimizer would return, at least on rank 0; call it on
        every rank."""
        return optimizer.state_dict()

    def load_full_optimizer_state_dict(
        self, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Load what `full_optimizer_state_dict` of any strategy gave, on every rank."""
        optimizer.load_state_dict(dict(state))

    # What a strategy defines.

    def _reduce(self) -> None:
        """Start all reductions that are not under way; a missing gradient counts as zeros."""
        raise NotImplementedError

    def _complete(self) -> None:
        """Put the averages where the gradients are, also for parameters that had none."""
        raise NotImplementedError

    def _is_unfinished(self) -> bool:
        """Tell whether a backward pass has begun what no call has finished."""
        return False

    def _prepare_forward(self) -> None:
        """Do what is due before a forward pass with gradients."""

    def _reporting(self) -> AbstractContextManager[Any]:
        """Enclose the launch of the report."""
        return nullcontext()

    # What strategies use.

    def _trainable(self) -> Iterator[nn.Parameter]:
        """Iterate over what was trainable when it was wrapped."""
        pairs = zip(self._parameters_once.values(), self._was_trainable, strict=True)
        return (parameter for parameter, was_trainable in pairs if was_trainable)

    def _watch(self, grads: list[Tensor]) -> None:
        """Note the largest magnitude of local gradients, before they are reduced."""
        if self.check_finite and (grads := [grad for grad in grads if grad.numel()]):
            self._largest.append(torch.nn.utils.get_total_norm(grads, float("inf")))

    # The step's protocol.

    def _start_forward(self) -> None:
        if self._is_unfinished():
            # A backward pass raised. Other ranks may wait for the rest of this one's reductions.
            for parameter in self._synchronize():
                parameter.grad = None
            self._report.read()
        self._prepare_forward()
        if self._buffers_due and self._running_buffers:
            self._broadcast(self._running_buffers)
        self._buffers_due = False

    def _synchronize(self) -> list[nn.Parameter]:
        """Reduce, report and complete; returns the parameters that had no gradient here."""
        if self._report.is_unread:
            self._judge(self._report.read())
        missing, changed = [], []
        parameters = list(self._parameters_once.values())
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad != self._was_trainable[index]:
                changed.append(index)
            elif parameter.requires_grad and parameter.grad is None:
                missing.append(index)
        self._reduce()
        nonfinite = self._is_nonfinite()
        with self._reporting():
            self._report.launch(missing, changed, nonfinite)
        self._complete()
        self._report.wait()
        self._buffers_due = True
        return [parameters[index] for index in missing]

    def _is_nonfinite(self) -> Tensor | None:
        largest, self._largest = self._largest, []
        return ~torch.stack([value.isfinite() for value in largest]).all() if largest else None

    def _judge(self, verdict: Verdict) -> None:
        """Act on a report, in the same way on every rank."""
        named = list(self._parameters_once.items())
        if changed := _names(named, verdict.num_changed):
            raise UsageError(
                f"{self.strategy}: requires_grad must stay as it was wrapped, got a change of "
                f"{changed}; wrap the module again"
            )
        if verdict.nonfinite_ranks:
            self.num_skipped_steps += 1
            for _, parameter in named:
                parameter.grad = None
            raise NonFiniteGradientError(verdict.nonfinite_ranks)
        if self.find_unused:
            for (_, parameter), num_missing in zip(named, verdict.num_missing, strict=True):
                if num_missing == self.world_size:
                    parameter.grad = None
        elif missing := _names(named, verdict.num_missing):
            raise UsageError(
                f"{self.strategy}: every trainable parameter must get a gradient, got none for "
                f"{missing} (of {self.world_size}); find_unused=True allows it"
            )

    def _broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrite with rank 0's values, all in flight at once."""
        works, copies = [], []
        for tensor in (without_repeats(tensor.detach()) for tensor in tensors if tensor.numel()):
            sent = tensor if is_dense(tensor) else tensor.contiguous()
            works.append(broadcast(in_memory_order(sent), self.group, async_op=True))
            if sent is not tensor:
                copies.append((tensor, sent))
        for work in works:
            assert work is not None
            work.wait()
        for tensor, sent in copies:
            tensor.copy_(sent)


def _saved_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers that the state dict carries; others are constants and caches."""
    saved = {id(value) for value in module.state_dict(keep_vars=True).values()}
    return [buffer for buffer in buffers_once(module).values() if id(buffer) in saved]


def _names(named: list[tuple[str, nn.Parameter]], counts: tuple[int, ...]) -> str:
    """Say which parameters have a count, and on how many ranks."""
    found = [
        f"{name!r} on {count} rank{'s' if count > 1 else ''}"
        for (name, _), count in zip(named, counts, strict=True)
        if count
    ]
    shown = ", ".join(found[:8])
    return shown if len(found) <= 8 else f"{shown} and {len(found) - 8} more"
