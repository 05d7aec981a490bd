"""Losses and norms that stay on the device until somebody wants to see them."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from cs336_systems.errors import UsageError
from cs336_systems.parallel.collectives import all_reduce


class Losses:
    """Keeps each step's numbers of one rank; read, they are those of all ranks together."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self.loss: float | None = None
        """Of the last step that was read."""
        self.norm: float | None = None
        """Of its gradients before clipping."""
        self.since_line: list[float] = []
        """Of the steps read since the last line of the log."""

    def add(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Note a step without waiting for it."""
        self._steps.append(step)
        self._losses.append(loss)
        if norm is not None:
            self._norms.append(norm)

    def read(self) -> None:
        """Wait for the device and take in what has been noted since the last time.

        Cost: one all-reduce, one copy to the host.
        Raises: UsageError, on every rank, naming the first step whose loss or norm is not finite.
        """
        if not self._steps:
            return
        losses = torch.stack(self._losses).double()
        all_reduce(losses)
        losses /= self._world_size
        norms = torch.stack(self._norms).double() if self._norms else losses.new_ones(len(losses))
        both = torch.stack([losses, norms]).tolist()
        steps, has_norms = self._steps, bool(self._norms)
        self._steps, self._losses, self._norms = [], [], []
        for step, loss, norm in zip(steps, *both, strict=True):
            for name, value in (("loss", loss), ("gradients' norm", norm)):
                if not math.isfinite(value):
                    raise UsageError(f"train: {name} must be finite, got {value} at step {step}")
        self.since_line += both[0]
        self.loss, self.norm = both[0][-1], both[1][-1] if has_norms else None

    def take_mean(self) -> float:
        """Return the mean loss of the steps since the last line of the log, and begin the next."""
        taken, self.since_line = self.since_line, []
        return fmean(taken)
