"""Error budgets for attention: what the plain formula errs in the same dtype, and what rounding
must err."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("o", "dq", "dk", "dv")


def term_magnitudes(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[float, ...]:
    """Return the largest terms that are summed for o, dq, dk and dv.

    Terms may cancel (with one key dq is exactly 0), but each was rounded at its own magnitude.
    """
    q, k, v, do = (tensor.detach().double().abs() for tensor in (q, k, v, do))
    scale = 1 / math.sqrt(q.shape[-1])
    score_gradient = scale * (do @ v.transpose(-2, -1)).max().item()
    return (
        v.max().item(),
        score_gradient * k.max().item(),
        score_gradient * q.max().item(),
        do.max().item(),
    )


def assert_within_budget(
    got: list[Tensor],
    plain: list[Tensor],
    truth: list[Tensor],
    magnitudes: tuple[float, ...],
    factor: float = 3.0,
) -> None:
    """Hold each of o, dq, dk, dv to `factor` times the plain formula's error and one rounding of
    its terms."""
    for name, mine, theirs, exact, magnitude in zip(
        NAMES, got, plain, truth, magnitudes, strict=True
    ):
        assert mine.dtype == theirs.dtype
        error = (mine.double() - exact).abs().max().item()
        rounding = torch.finfo(mine.dtype).eps * magnitude
        budget = factor * (theirs.double() - exact).abs().max().item() + rounding
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
