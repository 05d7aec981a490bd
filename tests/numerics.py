"""Error budgets for attention: what the plain formula errs in the same dtype, and what rounding
must err."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.masks import causal_mask

NAMES = ("o", "dq", "dk", "dv")
_SCORE_ROUNDINGS = 5


def term_magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rounded_scores: bool = False,
    names: Sequence[str] = NAMES,
) -> tuple[float, ...]:
    """Return the largest terms that are summed for each of `names`: o, lse, dq, dk, dv.

    Terms may cancel (with one key dq is exactly 0), but each was rounded at its own magnitude.
    With `rounded_scores`, a weight exp(S - L) may also err by the roundings of S and L, which are
    held in fp32 at least: S is rounded when it is summed and when it is scaled, L when it is taken,
    turned into natural units and back. Relative to the weight, each is half of fp32's eps times
    their magnitude.
    """
    score_eps = (
        _SCORE_ROUNDINGS / 2 * min(torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps, 1.0)
    )
    scale = abs(scale_or_default(scale, q.shape[-1]))
    q, k, v, do = (tensor.detach().double().abs() for tensor in (q, k, v, do))
    k, v = repeat_heads(q, k, v)
    seen = causal_mask(q.shape[-2], k.shape[-2], q.device) if is_causal else True
    score = (scale * (q @ k.mT) * seen).max().item()
    score_gradient = (scale * (do @ v.mT) * seen).max().item()
    roundings = 1 + (score_eps * score if rounded_scores else 0.0)
    largest = {
        "o": roundings * v.max().item(),
        "lse": score,
        "dq": roundings * score_gradient * k.max().item(),
        "dk": roundings * score_gradient * q.max().item(),
        "dv": roundings * do.max().item(),
    }
    return tuple(largest[name] for name in names)


def assert_within_budget(
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    magnitudes: Sequence[float],
    factor: float = 3.0,
    names: Sequence[str] = NAMES,
) -> None:
    """Hold each of `names` to `factor` times the plain formula's error and one rounding of its
    largest term or of the largest sum."""
    for name, mine, theirs, exact, magnitude in zip(
        names, got, plain, truth, magnitudes, strict=True
    ):
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype} for {theirs.dtype}"
        assert mine.shape == exact.shape, f"{name}: {tuple(mine.shape)} for {tuple(exact.shape)}"
        error = (mine.double() - exact).abs().max().item()
        largest = exact.abs().max().item() if exact.numel() else 0.0
        rounding = torch.finfo(mine.dtype).eps * max(magnitude, largest)
        budget = factor * (theirs.double() - exact).abs().max().item() + rounding
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def let_grow(q: Tensor, k: Tensor, per_tile: float) -> None:
    """Have logits in base 2 grow by so much for each 128 keys towards the first, which the forward
    kernel comes to last.

    In place; for the default scale.
    """
    unit = 4 * q.shape[-1] ** -0.5 * math.log2(math.e)
    with torch.no_grad():
        q[..., 0] = 4.0
        k[..., 0] = torch.arange(k.shape[2], 0, -1, device=k.device) * per_tile / 128 / unit
