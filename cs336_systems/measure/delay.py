"""A known amount of work, to test clocks: the device is busy for a given time by its own clock."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _spin_kernel(elapsed_ptr, nanoseconds):
    start = globaltimer()
    elapsed = globaltimer() - start
    while elapsed < nanoseconds:
        elapsed = globaltimer() - start
    tl.store(elapsed_ptr, elapsed)


def spin(elapsed: torch.Tensor, milliseconds: float) -> None:
    """Queue a kernel that keeps `elapsed`'s device busy for `milliseconds` and stores there the
    time it took.

    Shapes: elapsed (1,) int64, in nanoseconds of the device's global timer.
    """
    _spin_kernel[(1,)](elapsed, int(milliseconds * 1e6), num_warps=1)
