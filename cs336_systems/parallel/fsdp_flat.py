"""Weights that travel together: one flat vector of which every rank keeps an equal part.

A rank's shard is a run of the vector, in the weights' own dtype (the masters); a weight's local
piece is where its elements and that run overlap, perhaps nowhere.

While the vector is gathered, layers use views of it, in the dtype that is computed in. Between
uses its storage is empty: the views that autograd saved come back to life with the next gathering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.parallel.collectives import all_gather_into
from cs336_systems.parallel.fsdp_layout import FlatLayout
from cs336_systems.parallel.fsdp_plan import Weight
from cs336_systems.parallel.fsdp_wire import Wire
from cs336_systems.parallel.side_stream import Ticket


class FlatShard:
    """This rank's part of some weights of one dtype that are trained, or frozen, together.

    `pieces[i]` is the part of weight i in the shard, `views[i]` the whole weight while it is there.
    """

    def __init__(
        self, weights: Sequence[Weight], wire: Wire, compute_dtype: torch.dtype | None
    ) -> None:
        first = weights[0].parameter
        # The parameters themselves are let go, or their memory would stay.
        self.names = [weight.names for weight in weights]
        self.owners = [weight.owners for weight in weights]
        self.dtype = first.dtype
        self.device = first.device
        self.is_trainable = first.requires_grad
        # Integers, as of quantised weights, are nothing to compute in another dtype.
        self.compute_dtype = self.dtype
        if compute_dtype is not None and self.dtype.is_floating_point:
            self.compute_dtype = compute_dtype
        self._wire = wire
        self.layout = FlatLayout(
            [weight.parameter.shape for weight in weights],
            self.compute_dtype,
            wire.rank,
            wire.world_size,
        )
        self._take_over([weight.parameter for weight in weights])
        self._prepare_views()
        self._gathering: Ticket | None = None

    @torch.no_grad()
    def _take_over(self, parameters: list[nn.Parameter]) -> None:
        self.shard = torch.zeros(self.layout.shard_numel, dtype=self.dtype, device=self.device)
        self.pieces: list[nn.Parameter] = []
        for index, parameter in enumerate(parameters):
            start, stop = self.layout.ranges[index]
            piece = self.layout.piece(self.shard, index)
            piece.copy_(parameter.detach().reshape(-1)[start:stop])
            self.pieces.append(nn.Parameter(piece, requires_grad=self.is_trainable))

    @torch.no_grad()
    def _prepare_views(self) -> None:
        layout = self.layout
        full = torch.empty(layout.padded_numel, dtype=self.compute_dtype, device=self.device)
        self._full, self._storage = full, full.untyped_storage()
        self._num_bytes = self._storage.nbytes()
        self._own = full.narrow(0, self._wire.rank * layout.shard_numel, layout.shard_numel)
        self.views: list[Tensor] = []
        for shape, offset in zip(layout.shapes, layout.offsets, strict=True):
            # Not a view to autograd: it counts its versions by itself, so that gathering again is
            # no change of a tensor that was saved for the backward pass.
            view = torch.empty(0, dtype=full.dtype, device=full.device)
            view.set_(self._storage, offset, shape)  # type: ignore[call-overload]
            self.views.append(view.requires_grad_(self.is_trainable))
        self._storage.resize_(0)

    @property
    def holds_its_pieces(self) -> bool:
        """Whether the pieces still are parts of the shard."""
        home = self.shard.untyped_storage().data_ptr()
        return all(
            piece.dtype == self.dtype and piece.untyped_storage().data_ptr() == home
            for piece in self.pieces
        )

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
        whole = shard.new_empty(self.layout.padded_numel)
        if self._num_bytes:
            all_gather_into(whole, shard, self._wire.group)
        return whole
