"""What an attention's autograd function needs besides its mathematics: autocast, an end to
differentiation, and arguments that torch.compile gets right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts a product's operands: to its dtype where it is on, but not fp64."""
    first = tensors[0]
    kind = "cuda" if first.is_cuda else first.device.type  # the former takes a tenth of the time
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast, which would round accumulators, out of a block."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def forbid_second_derivative(gradients: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Return a backward pass's gradients such that differentiating them raises a RuntimeError.

    torch's `once_differentiable` stays silent where the output's gradient needs none itself, as
    below a sum, and the second derivative would lack a term.
    """
    # Grad mode is on in a backward pass when a graph of it is asked for. A compiler has an error
    # of its own for that.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return _DifferentiatedOnce.apply(len(gradients), *gradients, *sources)


class _DifferentiatedOnce(torch.autograd.Function):
    """The identity on its first `count` tensors, without a derivative by any."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        rule = "attention: gradient must not be differentiated again"
        raise RuntimeError(f"{rule}, got a second backward pass")


def distinct(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Let no tensor be two arguments of one compiled autograd function: torch 2.11 then loses all
    gradients of it but one."""
    return (k.view_as(k), v.view_as(v)) if torch.compiler.is_compiling() else (k, v)


def fix_lengths(q: Tensor, k: Tensor) -> None:
    """Tell a compiler that lengths are constants of its graph, in which tiles are unrolled.

    It would see so at the first loop, too late for torch 2.11, which stops at an assertion.
    """
    for x in (q, k):
        len(range(x.shape[-2]))
