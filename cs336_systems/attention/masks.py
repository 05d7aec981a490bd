"""The causal mask, written once."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return a boolean mask (num_queries, num_keys), True where query i may see key j: j <= i."""
    rows = torch.arange(num_queries, device=device)[:, None]
    return rows >= torch.arange(num_keys, device=device)[None, :]
