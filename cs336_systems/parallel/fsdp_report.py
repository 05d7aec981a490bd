"""The step's report with one more question: did all ranks run the same collectives?

Two ranks whose models take different ways would fill each other's buffers with the wrong weights
wherever sizes happen to agree. The sequence's digest travels as further flags of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from cs336_systems.errors import UsageError
from cs336_systems.parallel.collectives import Group
from cs336_systems.parallel.report import StepReport, Verdict

_NUM_BITS = 32


class OrderReport(StepReport):
    """A step's vector whose last flags are the bits of what `take_digest` returns."""

    def __init__(
        self,
        num_parameters: int,
        group: Group,
        device: torch.device,
        *,
        check_finite: bool,
        take_digest: Callable[[], int],
    ) -> None:
        super().__init__(num_parameters + _NUM_BITS, group, device, check_finite=check_finite)
        self._num_own = num_parameters
        self._take_digest = take_digest

    def launch(
        self, missing: Collection[int], changed: Collection[int], nonfinite: Tensor | None
    ) -> None:
        """Start to add up what this rank has to say, its digest included."""
        digest = self._take_digest()
        bits = [self._num_own + bit for bit in range(_NUM_BITS) if digest >> bit & 1]
        super().launch([*missing, *bits], changed, nonfinite)

    def read(self) -> Verdict:
        """Wait for the result and return it.

        Raises: UsageError when the ranks' sequences differ.
        """
        verdict = super().read()
        bits = verdict.num_missing[self._num_own :]
        if any(count not in (0, self._world_size) for count in bits):
            raise UsageError(
                "fsdp: every rank must run the same layers in the same order, as each gathers "
                "weights from all ranks; got different orders"
            )
        return replace(
            verdict,
            num_missing=verdict.num_missing[: self._num_own],
            num_changed=verdict.num_changed[: self._num_own],
        )
