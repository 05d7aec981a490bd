"""The small vector by which ranks learn of each other's step: unused, changed and non-finite.

One int32 all-reduce tells every rank the same, so that all of them raise or none does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel.collectives import Group, all_reduce


class NonFiniteGradientError(RuntimeError):
    """Ranks had infinite or undefined gradients; no rank has any gradient left."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        names = ", ".join(map(str, ranks))
        plural = "s" if len(self.ranks) > 1 else ""
        super().__init__(f"gradients must be finite, got inf or nan on rank{plural} {names}")


@dataclass(frozen=True)
class Verdict:
    """What all ranks together said of one step."""

    num_missing: tuple[int, ...]
    """For each parameter, on how many ranks it had no gradient."""
    num_changed: tuple[int, ...]
    """For each parameter, on how many ranks it was frozen or thawed since it was wrapped."""
    nonfinite_ranks: tuple[int, ...]


class StepReport:
    """One step's vector, from its launch to its reading.

    Shapes: int32 (num_parameters [+ world_size if check_finite],); a parameter's element is
    missing + (world_size + 1) * changed, in ranks.
    """

    def __init__(
        self, num_parameters: int, group: Group, device: torch.device, *, check_finite: bool
    ) -> None:
        self._num_parameters = num_parameters
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        length = num_parameters + (self._world_size if check_finite else 0)
        on_gpu = device.type == "cuda"
        # Pinned, so that neither copy makes the host wait for the device.
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=on_gpu)
        self._vector = torch.zeros(length, dtype=torch.int32, device=device)
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._work: dist.Work | None = None
        self.is_unread = False

    def launch(
        self, missing: Collection[int], changed: Collection[int], nonfinite: Tensor | None
    ) -> None:
        """Start to add up what this rank has to say; `nonfinite` is a flag on the device."""
        elements = [0] * self._host.numel()
        for index in missing:
            elements[index] += 1
        for index in changed:
            elements[index] += self._world_size + 1
        self._host.copy_(torch.tensor(elements, dtype=torch.int32))
        self._vector.copy_(self._host, non_blocking=True)
        if nonfinite is not None:
            self._vector[self._num_parameters + self._rank] = nonfinite
        self._work = all_reduce(self._vector, self._group, async_op=True)

    def wait(self) -> None:
        """Order the result's copy to the host behind the all-reduce; waits only on a CPU."""
        assert self._work is not None
        self._work.wait()
        self._host.copy_(self._vector, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._work, self.is_unread = None, True

    def read(self) -> Verdict:
        """Wait for the result and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self.is_unread = False
        elements = self._host.tolist()
        pairs = [divmod(value, self._world_size + 1) for value in elements[: self._num_parameters]]
        flags = elements[self._num_parameters :]
        return Verdict(
            num_missing=tuple(missing for _, missing in pairs),
            num_changed=tuple(changed for changed, _ in pairs),
            nonfinite_ranks=tuple(rank for rank, flag in enumerate(flags) if flag),
        )
