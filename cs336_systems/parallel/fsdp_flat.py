"""Weights that travel together: one flat vector of which every rank keeps an equal part.

The vector holds the weights one after the other, each at an aligned place, and is padded so that it
divides by the number of ranks. A rank's shard is a run of it, in the weights' own dtype (the
masters); a weight's local piece is where its elements and that run overlap, perhaps nowhere.

While the vector is gathered, layers use views of it, in the dtype that is computed in. Between
uses its storage is empty: the views that autograd saved come back to life with the next gathering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.collectives import (
    Group,
    all_gather_into,
    reduce_scatter_into,
)
from cs336_systems.parallel.fsdp_plan import Weight
from cs336_systems.parallel.layout import check_strided
from cs336_systems.parallel.side_stream import SideStream, Ticket

# What vectorised kernels and matrix products ask of an address.
_ALIGNMENT_BYTES = 16


@dataclass
class GatheredBytes:
    """How much of the gathered vectors is alive, and the most that ever was."""

    now: int = 0
    peak: int = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


@dataclass
class Wire:
    """How vectors travel: between whom, beside what, and what becomes of a sum."""

    group: Group
    rank: int
    world_size: int
    side: SideStream
    average_op: Any
    divisor: int
    """What the reduction's result is still to be divided by."""
    watch: Callable[[list[Tensor]], None]
    """Sees the local gradients before they are reduced."""
    gathered: GatheredBytes = field(default_factory=GatheredBytes)


class FlatShard:
    """This rank's part of some weights of one dtype that are trained, or frozen, together.

    Shapes: shard (padded / world_size,), the gathered vector (padded,); `pieces[i]` is the part of
    weight i in the shard, `views[i]` has the weight's shape.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        wire: Wire,
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
    ) -> None:
        first = weights[0].parameter
        # The parameters themselves are let go, or their memory would stay.
        self.names = [weight.names for weight in weights]
        self.owners = [weight.owners for weight in weights]
        self.shapes = [weight.parameter.shape for weight in weights]
        self.dtype = first.dtype
        self.is_trainable = first.requires_grad
        # Integers, as of quantised weights, are nothing to compute in another dtype.
        self.compute_dtype = self.dtype
        if compute_dtype is not None and self.dtype.is_floating_point:
            self.compute_dtype = compute_dtype
        self.communication_dtype = communication_dtype or self.compute_dtype
        self._wire = wire
        self._device = first.device
        self._lay_out()
        self._take_over([weight.parameter for weight in weights])
        self._prepare_views()
        # With a dim and the masters' dtype, so that a division by it is in that dtype.
        self._divisor = torch.full((1,), wire.divisor, dtype=self.dtype, device=self._device)
        self._gathering: Ticket | None = None
        self._reducing: Ticket | None = None
        self._accumulated: Tensor | None = None
        self._gradient: Tensor | None = None
        self._num_reduced = 0
        self.arrived: set[int] = set()

    def _lay_out(self) -> None:
        alignment = max(1, _ALIGNMENT_BYTES // self.compute_dtype.itemsize)
        self.numels = [shape.numel() for shape in self.shapes]
        self.offsets: list[int] = []
        end = 0
        self._run_lengths: list[int] = []  # of a weight and the gap after it, alternating
        for numel in self.numels:
            self.offsets.append(end)
            aligned = math.ceil(numel / alignment) * alignment
            self._run_lengths += [numel, aligned - numel]
            end += aligned
        unit = self._wire.world_size * alignment
        self.padded_numel = math.ceil(end / unit) * unit
        self._run_lengths[-1] += self.padded_numel - end
        self.shard_numel = self.padded_numel // self._wire.world_size

    @torch.no_grad()
    def _take_over(self, parameters: list[nn.Parameter]) -> None:
        self.shard = torch.zeros(self.shard_numel, dtype=self.dtype, device=self._device)
        self.pieces: list[nn.Parameter] = []
        for index, parameter in enumerate(parameters):
            start, stop = self.range_in_weight(index)
            piece = self.local(self.shard, index)
            piece.copy_(parameter.detach().reshape(-1)[start:stop])
            self.pieces.append(nn.Parameter(piece, requires_grad=self.is_trainable))

    @torch.no_grad()
    def _prepare_views(self) -> None:
        full = torch.empty(self.padded_numel, dtype=self.compute_dtype, device=self._device)
        self._full, self._storage = full, full.untyped_storage()
        self._num_bytes = self._storage.nbytes()
        self._own = full[self._wire.rank * self.shard_numel :][: self.shard_numel]
        self.views: list[Tensor] = []
        for shape, offset in zip(self.shapes, self.offsets, strict=True):
            # Not a view to autograd: it counts its versions by itself, so that gathering again is
            # no change of a tensor that was saved for the backward pass.
            view = torch.empty(0, dtype=full.dtype, device=full.device)
            view.set_(self._storage, offset, shape)  # type: ignore[call-overload]
            self.views.append(view.requires_grad_(self.is_trainable))
        self._storage.resize_(0)

    # Where things are.

    def range_in_weight(self, index: int) -> tuple[int, int]:
        """Return from where to where in the flattened weight this rank's piece reaches."""
        begin = self._wire.rank * self.shard_numel - self.offsets[index]
        start = min(max(begin, 0), self.numels[index])
        stop = min(max(begin + self.shard_numel, 0), self.numels[index])
        return start, stop

    def local(self, shard: Tensor, index: int) -> Tensor:
        """View the part of weight `index` in a vector that lies as the shard does."""
        start, stop = self.range_in_weight(index)
        begin = (
            max(self.offsets[index] - self._wire.rank * self.shard_numel, 0) if stop > start else 0
        )
        return shard[begin : begin + stop - start]

    def full(self, vector: Tensor, index: int) -> Tensor:
        """View weight `index` in its shape in a vector that lies as the gathered one does."""
        flat = vector[self.offsets[index] :][: self.numels[index]]
        return flat.view(self.shapes[index])

    @property
    def holds_its_pieces(self) -> bool:
        """Whether the pieces still are parts of the shard."""
        home = self.shard.untyped_storage().data_ptr()
        return all(
            piece.dtype == self.dtype and piece.untyped_storage().data_ptr() == home
            for piece in self.pieces
        )

    # Gathering.

    @property
    def is_gathered(self) -> bool:
        """Whether the vector is there, or on its way."""
        return self._storage.nbytes() > 0

    @torch.no_grad()
    def launch_gather(self) -> None:
        """Start to collect all shards, each cast before it travels."""
        if self.is_gathered or self._num_bytes == 0:
            return
        self._storage.resize_(self._num_bytes)
        self._wire.gathered.add(self._num_bytes)

        def cast() -> None:
            self._own.copy_(self.shard)

        def gather(async_op: bool) -> dist.Work | None:
            return all_gather_into(self._full, self._own, self._wire.group, async_op=async_op)

        self._gathering = self._wire.side.launch(gather, before=cast)

    def wait_gather(self) -> None:
        """Let what is computed next see the gathered weights."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """Give the vector's memory back."""
        if self.is_gathered:
            self.wait_gather()
            self._storage.resize_(0)
            self._wire.gathered.add(-self._num_bytes)

    def collect(self, shard: Tensor) -> Tensor:
        """Return all ranks' parts of a vector that lies as the shard does, in its own dtype."""
        whole = shard.new_empty(self.padded_numel)
        if self.padded_numel:
            all_gather_into(whole, shard, self._wire.group)
        return whole

    # Gradients.

    @torch.no_grad()
    def note(self, index: int, *, accumulate: bool) -> None:
        """Take in that weight `index` has its local gradient of a backward pass.

        With `accumulate` it is added up here, unsharded and in the weights' own dtype, until the
        next reduction. From now on the piece has a gradient, whose values come with `complete`;
        taking it away takes back all that was noted.
        """
        self.arrived.add(index)
        self._promise(index, torch.zeros if accumulate else torch.empty)
        if accumulate:
            if self._accumulated is None:
                shape = self.padded_numel
                self._accumulated = torch.zeros(shape, dtype=self.dtype, device=self._device)
            gradient = self._taken_gradient(index)
            assert gradient is not None
            self.full(self._accumulated, index).add_(gradient)

    def _promise(self, index: int, allocate: Callable[..., Tensor]) -> None:
        if self._gradient is None:
            self._gradient = allocate(self.shard_numel, dtype=self.dtype, device=self._device)
        if self.pieces[index].grad is None:
            self.pieces[index].grad = self.local(self._gradient, index)

    def _taken_gradient(self, index: int) -> Tensor | None:
        gradient, self.views[index].grad = self.views[index].grad, None
        return None if gradient is None else check_strided(gradient)

    @torch.no_grad()
    def launch_reduce(self) -> None:
        """Start to average the ranks' gradients; a missing one counts as zeros."""
        if not self.padded_numel:
            return
        self.wait_reduce()  # its buffer is free again before the next one is allocated
        if self._gradient is None:
            self._gradient = self.shard.new_empty(self.shard_numel)
        whole, target, wire = self._packed_gradients(), self._gradient, self._wire
        is_first, self._num_reduced = self._num_reduced == 0, self._num_reduced + 1
        is_direct = is_first and self.communication_dtype == self.dtype
        reduced = target if is_direct else whole.new_empty(self.shard_numel)

        def finish() -> None:
            if not is_first:
                target.add_(reduced / self._divisor)
            elif wire.divisor > 1:
                torch.div(reduced, self._divisor, out=target)
            elif reduced is not target:
                target.copy_(reduced)

        def reduce(async_op: bool) -> dist.Work | None:
            op = wire.average_op
            return reduce_scatter_into(reduced, whole, wire.group, op=op, async_op=async_op)

        self._reducing = wire.side.launch(reduce, after=finish)

    def _packed_gradients(self) -> Tensor:
        """Return all local gradients as one vector on the way out, and forget them."""
        gradients = [self._taken_gradient(index) for index in range(len(self.shapes))]
        self._wire.watch([gradient for gradient in gradients if gradient is not None])
        if self._accumulated is not None:
            whole, self._accumulated = self._accumulated, None
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    self.full(whole, index).add_(gradient)
            return whole.to(self.communication_dtype)
        only = gradients[0]
        if (
            len(gradients) == 1
            and only is not None
            and only.numel() == self.padded_numel
            and only.dtype == self.communication_dtype
        ):
            return only.reshape(-1)  # nothing to copy
        whole = torch.empty(self.padded_numel, dtype=self.communication_dtype, device=self._device)
        runs = whole.split(self._run_lengths)
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        absent = [runs[2 * i] for i in range(len(gradients)) if i not in present]
        if empty := [run for run in [*runs[1::2], *absent] if run.numel()]:
            torch._foreach_zero_(empty)
        if present:
            flat = [gradient.reshape(-1) for gradient in gradients if gradient is not None]
            torch._foreach_copy_([runs[2 * index] for index in present], flat)
        return whole

    def wait_reduce(self) -> None:
        """Let what is computed next see the averages that are on their way."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None

    @torch.no_grad()
    def complete(self) -> None:
        """Make the averages the pieces' gradients, adding to those that were there before."""
        self.wait_reduce()
        gradient, self._gradient, self._num_reduced = self._gradient, None, 0
        self.arrived.clear()
        if gradient is None:
            return
        older: list[Tensor] = []
        newer: list[Tensor] = []
        for index, piece in enumerate(self.pieces):
            mine = self.local(gradient, index)
            if piece.grad is None:
                piece.grad = mine
            elif piece.grad.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
                older.append(piece.grad)
                newer.append(mine)
        if older:
            torch._foreach_add_(older, newer)

    @torch.no_grad()
    def discard_dropped(self) -> bool:
        """Forget what was noted of pieces whose gradient was taken away since, as zero_grad does;
        tells whether there were any."""
        dropped = [index for index in self.arrived if self.pieces[index].grad is None]
        if not dropped:
            return False
        self.wait_reduce()
        self.arrived.difference_update(dropped)
        for index in dropped:
            self.views[index].grad = None
            if self._gradient is not None:
                self.local(self._gradient, index).zero_()
            if self._accumulated is not None:
                self.full(self._accumulated, index).zero_()
        if not self.arrived:
            self._gradient, self._accumulated, self._num_reduced = None, None, 0
        return True

    @property
    def has_unsent(self) -> bool:
        """Whether there are gradients that no reduction has taken along."""
        return self._accumulated is not None or any(view.grad is not None for view in self.views)
