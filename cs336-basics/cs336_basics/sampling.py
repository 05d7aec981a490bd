"""Choosing the next token from a row of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cs336_basics.nn_utils import softmax


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raise ValueError for a temperature or a top_k that describes no distribution."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k!r}")


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id per row; temperature zero takes the likeliest.

    Shapes: logits (batch, vocab), result (batch,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    candidate_ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        # A stable sort makes the lower id win a tie. Only the k candidates are sampled from, so no
        # rounding can ever let another token through.
        logits, candidate_ids = logits.sort(dim=-1, descending=True, stable=True)
        logits, candidate_ids = logits[:, :top_k], candidate_ids[:, :top_k]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Shifted first, the likeliest logit is zero and stays zero for the smallest temperature.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = softmax(shifted / max(temperature, torch.finfo(torch.float32).tiny), dim=-1)
    drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)  # (batch, 1)
    return (drawn if candidate_ids is None else candidate_ids.gather(-1, drawn)).squeeze(-1)
