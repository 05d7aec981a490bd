"""The gradients of one flat shard, from the local ones of whole weights to averages of pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel.collectives import reduce_scatter_into
from cs336_systems.parallel.fsdp_flat import FlatShard
from cs336_systems.parallel.fsdp_wire import Wire
from cs336_systems.parallel.layout import check_strided
from cs336_systems.parallel.side_stream import Ticket


class ShardedGradient:
    """Adds up, reduces and hands out what arrives for the weights of `flat`.

    A piece has a gradient as soon as its weight has one, but with its values only after `complete`.
    That gradient is the user's: taking it away, as zero_grad does, takes back all it stands for.
    """

    def __init__(
        self, flat: FlatShard, wire: Wire, communication_dtype: torch.dtype | None
    ) -> None:
        self.flat = flat
        self._layout = flat.layout
        self._wire = wire
        self._communication_dtype = communication_dtype or flat.compute_dtype
        # With a dim and the masters' dtype, so that a division by it is in that dtype.
        self._divisor = torch.full((1,), wire.divisor, dtype=flat.dtype, device=flat.device)
        self._reducing: Ticket | None = None
        self._num_reduced = 0
        self._accumulated: Tensor | None = None
        self._shard: Tensor | None = None
        self.arrived: set[int] = set()
        """Weights that have a gradient which `complete` has not handed out."""

    def note(self, index: int, *, accumulate: bool) -> None:
        """Take in that weight `index` has its local gradient of a backward pass.

        With `accumulate` it is added up here, unsharded and in the masters' dtype, until the next
        reduction.
        """
        self.arrived.add(index)
        if self._shard is None:
            allocate = torch.zeros if accumulate else torch.empty
            self._shard = self._allocate(allocate, self._layout.shard_numel)
        if self.flat.pieces[index].grad is None:
            self.flat.pieces[index].grad = self._layout.piece(self._shard, index)
        if accumulate:
            if self._accumulated is None:
                self._accumulated = self._allocate(torch.zeros, self._layout.padded_numel)
            gradient = self._take(index)
            assert gradient is not None
            self._layout.weight(self._accumulated, index).add_(gradient)

    def _allocate(self, how: Callable[..., Tensor], numel: int) -> Tensor:
        return how(numel, dtype=self.flat.dtype, device=self.flat.device)

    def _take(self, index: int) -> Tensor | None:
        view = self.flat.views[index]
        gradient, view.grad = view.grad, None
        return None if gradient is None else check_strided(gradient)

    @torch.no_grad()
    def launch_reduce(self) -> None:
        """Start to average the ranks' gradients; a missing one counts as zeros."""
        if not self._layout.padded_numel:
            return
        self.wait_reduce()
        if self._shard is None:
            self._shard = self._allocate(torch.empty, self._layout.shard_numel)
        whole, target, wire = self._pack(), self._shard, self._wire
        is_first, self._num_reduced = self._num_reduced == 0, self._num_reduced + 1
        is_direct = is_first and self._communication_dtype == target.dtype
        reduced = target if is_direct else whole.new_empty(target.shape)

        def reduce(async_op: bool) -> dist.Work | None:
            op = wire.average_op
            return reduce_scatter_into(reduced, whole, wire.group, op=op, async_op=async_op)

        def average() -> None:
            if not is_first:
                target.add_(reduced / self._divisor)
            elif wire.divisor > 1:
                torch.div(reduced, self._divisor, out=target)
            elif reduced is not target:
                target.copy_(reduced)

        self._reducing = wire.side.launch(reduce, after=average)

    def _pack(self) -> Tensor:
        """Return all local gradients as one vector on the way out, and forget them."""
        gradients = [self._take(index) for index in range(len(self.flat.views))]
        self._wire.watch([gradient for gradient in gradients if gradient is not None])
        if self._accumulated is not None:
            whole, self._accumulated = self._accumulated, None
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    self._layout.weight(whole, index).add_(gradient)
            return whole.to(self._communication_dtype)
        return self._concatenate(gradients)

    def _concatenate(self, gradients: list[Tensor | None]) -> Tensor:
        dtype, numel, only = self._communication_dtype, self._layout.padded_numel, gradients[0]
        if only is not None and only.dtype == dtype and only.numel() == numel:
            return only.reshape(-1)  # one weight without a gap: nothing to copy
        whole = torch.empty(numel, dtype=dtype, device=self.flat.device)
        slots, empty = self._layout.split(whole)
        sources, targets = [], []
        for slot, gradient in zip(slots, gradients, strict=True):
            if gradient is None:
                empty.append(slot)
            else:
                sources.append(gradient.reshape(-1))
                targets.append(slot)
        if empty:
            torch._foreach_zero_(empty)
        if sources:
            torch._foreach_copy_(targets, sources)
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
        shard = self._shard
        self._forget()
        if shard is None:
            return
        older: list[Tensor] = []
        newer: list[Tensor] = []
        for index, piece in enumerate(self.flat.pieces):
            mine = self._layout.piece(shard, index)
            if piece.grad is None:
                piece.grad = mine
            elif piece.grad.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
                older.append(piece.grad)
                newer.append(mine)
        if older:
            torch._foreach_add_(older, newer)

    @torch.no_grad()
    def discard_dropped(self) -> bool:
        """Forget what came for pieces whose gradient was taken away since; tells whether there
        were any."""
        dropped = [index for index in self.arrived if self.flat.pieces[index].grad is None]
        if not dropped:
            return False
        self.wait_reduce()
        self.arrived.difference_update(dropped)
        for index in dropped:
            self.flat.views[index].grad = None
            if self._shard is not None:
                self._layout.piece(self._shard, index).zero_()
            if self._accumulated is not None:
                self._layout.weight(self._accumulated, index).zero_()
        if not self.arrived:
            self._forget()
        return True

    def _forget(self) -> None:
        self._shard, self._accumulated, self._num_reduced = None, None, 0
        self.arrived.clear()

    @property
    def has_unsent(self) -> bool:
        """Whether there are gradients that no reduction has taken along."""
        views = self.flat.views
        return self._accumulated is not None or any(view.grad is not None for view in views)
