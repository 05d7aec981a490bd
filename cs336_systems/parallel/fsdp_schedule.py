"""When units are gathered and freed: on demand at first, then ahead of use in the recorded order.

The order in which calls enter units is recorded in every forward pass and taken as the next one's
plan. While a call runs, the vectors of the next few are on their way; the last unit of a forward
pass stays for the backward pass, which walks the same record backwards. At no time more is there
than the unit in use, those ahead of it and the last one.

Every rank has to enter the same units in the same order, since each entry is a collective. In the
backward pass a rank may skip units that its loss does not depend on; it gathers them all the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cs336_systems.parallel.fsdp_plan import needs_weights_in_backward
from cs336_systems.parallel.fsdp_trace import Entry, Trace
from cs336_systems.parallel.fsdp_unit import Unit, current_backward

_NUM_AHEAD = 2


class Schedule:
    """Gathers and frees units around their calls, forward and backward."""

    def __init__(self, *, reshard_after_forward: bool) -> None:
        self._reshards = reshard_after_forward
        self.on_step: Callable[[], None] = lambda: None
        """Called when the backward pass has come to another entry."""
        self._gathered: dict[Unit, None] = {}
        self._order: list[Unit] = []
        self._trace: Trace | None = None
        self._open: list[Trace] = []
        self._is_as_planned = False
        self._lingering: Unit | None = None
        self._current: Entry | None = None
        self._wanted: list[Unit] = []
        self._digest = 0

    # The forward pass.

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Enclose one call of the wrapped module; it starts with nothing gathered."""
        if not _in_backward():
            self.release_all()
        outer, trace = self._trace, Trace()
        self._trace, self._is_as_planned, self._lingering = trace, True, None
        try:
            yield
            self._order = trace.units
        finally:
            self._trace = outer
            self._keep_for_backward(trace)

    def _keep_for_backward(self, trace: Trace) -> None:
        if _in_backward():
            return  # The whole pass was recomputed; what it gathered is needed now.
        watched = {entry.unit for entry in trace.to_come()}
        if watched:
            self._open.append(trace)
        kept = watched if not self._reshards else watched & {self._lingering}
        for unit in [unit for unit in self._gathered if unit not in kept]:
            self.release(unit)

    def enter(self, unit: Unit, module: nn.Module) -> Entry:
        """Have the weights of `unit` in place for a call of `module`, and the next ones coming."""
        unit.depth += 1
        if unit.depth > 1:
            assert unit.entry is not None
            return unit.entry
        reads_weights = needs_weights_in_backward(module)
        if self._trace is None:  # a call of a part of the model, or its recomputation
            if not _in_backward():
                self.release(unit)  # what is left of a forward pass may be out of date
            unit.entry = Trace().enter(unit, reads_weights=reads_weights)
        else:
            unit.entry = self._trace.enter(unit, reads_weights=reads_weights)
            self._follow_plan(unit, unit.entry.position)
        self.gather(unit)
        if self._trace is not None and self._is_as_planned:
            for ahead in self._order[unit.entry.position + 1 :][:_NUM_AHEAD]:
                self.gather(ahead)
        unit.make_resident()
        return unit.entry

    def is_open(self, unit: Unit) -> bool:
        """Whether a layer of the unit may run as it is."""
        return unit.depth > 0 or (unit.is_resident and _in_backward())

    def _follow_plan(self, unit: Unit, position: int) -> None:
        if self._lingering is not None and self._lingering is not unit:
            self.release(self._lingering)
        self._lingering = None
        if self._is_as_planned and self._order[position : position + 1] != [unit]:
            self._is_as_planned = False
            if self._reshards:  # what was gathered ahead may be of no use
                for other in [other for other in self._gathered if other is not unit]:
                    self.release(other)

    def leave(self, entry: Entry) -> None:
        """Free the weights after the call, unless they are needed again right away."""
        unit = entry.unit
        unit.depth -= 1
        if unit.depth:
            return
        if self._trace is None:
            if not (_in_backward() and unit in self._wanted):
                self.release(unit)
        elif not self._reshards and entry.is_watched:
            return
        elif self._is_as_planned and self._order[entry.position + 1 :][:1] not in ([], [unit]):
            self.release(unit)
        else:
            self._lingering = unit

    def watch(self, output: object, entry: Entry) -> None:
        """Have the weights gathered again before the gradient of `output` goes on."""
        if not entry.reads_weights or not torch.is_grad_enabled():
            return
        # On another rank a gradient may pass a frozen unit that none passes here.
        entry.is_watched = entry.is_watched or entry.follows_trained
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                entry.is_watched = True
                tensor.register_hook(lambda _: self.before_backward(entry))

    # The backward pass.

    def before_backward(self, entry: Entry) -> None:
        """Have the weights in place for the backward pass of a call, and the next ones coming.

        Raises: RuntimeError when the weights are not those of the call any more.
        """
        if entry is not self._current or not entry.unit.is_resident:
            self._walk_to(entry)

    @torch.no_grad()
    def _walk_to(self, entry: Entry) -> None:
        if entry.version != entry.unit.version:
            raise RuntimeError(
                f"fsdp: weights must stay as they were until the backward pass of their call, "
                f"got changed ones in {entry.unit.name!r}"
            )
        self._finish_newer(entry.trace)
        self._finish(entry.trace, entry.position + 1)
        self._step_to(entry)
        entry.unit.make_resident()

    def _finish_newer(self, trace: Trace) -> None:
        """Come by what is left of later forward passes, whose backward comes first and is over.

        On another rank a gradient may have passed units there that none passed here.
        """
        if trace not in self._open:
            return
        newer = self._open[self._open.index(trace) + 1 :]
        for begun in reversed([other for other in newer if other.has_begun]):
            self._finish(begun)

    def _finish(self, trace: Trace, down_to: int = 0) -> None:
        for skipped in trace.to_come(down_to):
            self._step_to(skipped)

    @torch.no_grad()
    def walk_rest(self, *, only_begun: bool) -> None:
        """Gather what other ranks may have had use for in backward passes that ended early here.

        only_begun: leave alone forward passes whose backward pass may yet come.
        """
        for trace in reversed(self._open):
            if trace.has_begun or not only_begun:
                self._finish(trace)
        self._open = [trace for trace in self._open if only_begun and not trace.has_begun]

    def is_over(self, unit: Unit) -> bool:
        """Whether no gradient of `unit` is to be expected any more."""
        return all(trace.is_over(unit) for trace in self._traces_under_way())

    def release_if_last(self, unit: Unit) -> None:
        """Free a unit that has all its gradients, unless its weights have another use to come.

        On another rank its gradients may not be complete yet: both have to gather it for that.
        """
        if unit.depth == 0 and all(trace.is_in_last(unit) for trace in self._traces_under_way()):
            self.release(unit)

    def _traces_under_way(self) -> list[Trace]:
        return self._open if self._current is None else [self._current.trace, *self._open]

    def _step_to(self, entry: Entry) -> None:
        self._current, self._wanted = entry, entry.trace.window(entry, _NUM_AHEAD)
        entry.trace.move_to(entry)
        self.on_step()
        if self._reshards:
            for unit in [unit for unit in self._gathered if unit not in self._wanted]:
                self.release(unit)
        for unit in self._wanted:
            self.gather(unit)

    # What both are made of.

    def gather(self, unit: Unit) -> None:
        """Start to gather a unit that is not there."""
        if unit.launch_gather():
            self._gathered[unit] = None
            self.note("gather", unit)

    def release(self, unit: Unit) -> None:
        """Free a unit, whatever its state."""
        unit.release()
        self._gathered.pop(unit, None)

    def release_all(self) -> None:
        """Free all units, so that the next use sees the weights as they are by then."""
        for unit in list(self._gathered):
            self.release(unit)
        self._current, self._wanted = None, []

    def note(self, what: str, unit: Unit) -> None:
        """Take a collective into the digest of this step."""
        self._digest = zlib.crc32(f"{what} {unit.index}".encode(), self._digest)

    def take_digest(self) -> int:
        """Return 32 bits that tell one sequence of collectives from another, and start anew."""
        digest, self._digest = self._digest, 0
        return digest


def tensors_in(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a module's output, also from inside containers and plain objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple | set):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dict__") and not isinstance(output, type | nn.Module):
        yield from tensors_in(vars(output))


def _in_backward() -> bool:
    """Whether this thread runs a backward pass, as it does when a forward is recomputed."""
    return current_backward() != -1
