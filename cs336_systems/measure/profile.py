"""NVTX ranges that cost nothing when off, and a model's attention split into named ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_OFF: AbstractContextManager[None] = nullcontext()


class Ranges:
    """Named ranges for a profiler's timeline: `with ranges("forward"): ...`.

    Off, a range is one shared context object that does nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return torch.cuda.nvtx.range(name) if self.enabled else _OFF


@contextmanager
def annotated_attention(enabled: bool, softmax: Callable[..., Tensor]) -> Iterator[None]:
    """While active, the language model's own attention marks its scores, softmax and final product.

    The course's way: the model looks its attention up as a module attribute, so replacing that
    attribute annotates every layer. Undone on exit, whatever happens.
    """
    if not enabled:
        yield
        return
    import cs336_basics.model as basics

    ranges = Ranges(enabled=True)

    def attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
        with ranges("scaled dot product attention"):
            with ranges("attention scores"):
                scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])
                if mask is not None:
                    scores = scores.masked_fill(~mask, float("-inf"))
            with ranges("softmax"):
                weights = softmax(scores, dim=-1)
            with ranges("final matmul"):
                return weights @ V

    original = basics.scaled_dot_product_attention
    basics.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        basics.scaled_dot_product_attention = original
