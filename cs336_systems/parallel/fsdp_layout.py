"""How weights lie one after the other in a flat vector of which every rank has an equal run.

Each weight begins at an aligned place, and the end is padded so that the vector divides by the
number of ranks. What is in the gaps never leaves the vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What vectorised kernels and matrix products ask of an address.
_ALIGNMENT_BYTES = 16


class FlatLayout:
    """Where each weight is in the vector, and where this rank's piece of it is.

    Shapes: a whole vector is (padded_numel,), a rank's shard of it (shard_numel,).
    """

    def __init__(
        self, shapes: Sequence[torch.Size], dtype: torch.dtype, rank: int, world_size: int
    ) -> None:
        self.shapes = list(shapes)
        self._numels = [shape.numel() for shape in shapes]
        alignment = max(1, _ALIGNMENT_BYTES // dtype.itemsize)
        lengths = [math.ceil(numel / alignment) * alignment for numel in self._numels]
        self.offsets = [sum(lengths[:index]) for index in range(len(lengths))]
        step = world_size * alignment
        self.padded_numel = math.ceil(sum(lengths) / step) * step
        self.shard_numel = self.padded_numel // world_size
        gaps = [length - numel for length, numel in zip(lengths, self._numels, strict=True)]
        gaps[-1] += self.padded_numel - sum(lengths)
        self._runs = [run for pair in zip(self._numels, gaps, strict=True) for run in pair]
        self._begin = rank * self.shard_numel
        self.ranges = [self._range_in_weight(index) for index in range(len(lengths))]
        """From where to where in each flattened weight this rank's piece reaches."""

    def _range_in_weight(self, index: int) -> tuple[int, int]:
        begin, numel = self._begin - self.offsets[index], self._numels[index]
        start = min(max(begin, 0), numel)
        return start, min(max(begin + self.shard_numel, 0), numel)

    def piece(self, shard: Tensor, index: int) -> Tensor:
        """View this rank's part of a weight in a shard."""
        start, stop = self.ranges[index]
        if start == stop:
            return shard[:0]
        begin = self.offsets[index] + start - self._begin
        return shard[begin : begin + stop - start]

    def weight(self, whole: Tensor, index: int) -> Tensor:
        """View a weight, in its shape, in a whole vector."""
        flat = whole.narrow(0, self.offsets[index], self._numels[index])
        return flat.view(self.shapes[index])

    def split(self, whole: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """View all weights, flat, and the gaps that are not empty."""
        runs = whole.split(self._runs)
        return list(runs[::2]), [gap for gap in runs[1::2] if gap.numel()]
