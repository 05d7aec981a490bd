"""Softmax, cross-entropy and gradient clipping, written to survive extreme values.

Half-precision inputs are computed in fp32; fp64 stays fp64. A logit of -inf has probability zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def softmax(x: Tensor, dim: int) -> Tensor:
    """Exponentials along `dim` divided by their sum; a slice of -inf alone gives zeros, not NaN."""
    exponentials = _shift_below_zero(x, dim).exp_()
    return (exponentials / _total(exponentials, dim)).to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of `softmax`, taken without ever forming a probability that could underflow."""
    shifted = _shift_below_zero(x, dim)
    return (shifted - _total(shifted.exp(), dim).log()).to(x.dtype)


def cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of integer `targets` under the logits `inputs`.

    Shapes: inputs (..., vocab), targets (...), result (), fp32 for half-precision inputs.
    Raises: ValueError for shapes that do not match, targets that are no token ids or, on the CPU,
        outside the vocabulary.
    """
    if inputs.ndim == 0 or inputs.shape[:-1] != targets.shape:
        raise ValueError(
            "cross_entropy: targets must have the shape of inputs without its last dim, "
            f"got inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}"
        )
    vocab_size = inputs.shape[-1]
    column = checked_ids("cross_entropy", "targets", targets, vocab_size).reshape(-1)
    row = torch.arange(len(column), device=column.device)
    # The one wide copy serves both terms: first its entries, then in place its exponentials. Their
    # gradients meet in fp32, where p - 1 of a sure prediction has not yet been rounded to zero.
    shifted = _shift_below_zero(inputs.reshape(len(column), vocab_size), dim=-1)
    target_logits = shifted[row, column]  # unlike gather, this keeps nothing wide for backward
    return (_total(shifted.exp_(), dim=-1).log().squeeze(-1) - target_logits).mean()


@torch.no_grad()
def clip_gradient(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    Returns the norm before clipping, in at least fp32, on the first gradient's device. Parameters
    without a gradient are ignored and a tied parameter counts once.
    Raises: ValueError when `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradient: max_norm must be positive, got {max_norm!r}")
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    gradients = list({id(p): p.grad for p in parameters if p.grad is not None}.values())
    if not gradients:
        return torch.zeros(())
    home = gradients[0].device
    norms = [torch.linalg.vector_norm(g, dtype=_wide_dtype(g)).to(home) for g in gradients]
    total_norm = torch.linalg.vector_norm(torch.stack(_same_dtype(norms)))
    # A clamp instead of an `if`: the host never waits for the device to learn the norm.
    scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return total_norm


def checked_ids(where: str, name: str, ids: Tensor, num_ids: int) -> Tensor:
    """Return `ids` as an index tensor, having checked what can be checked without a device sync."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{where}: {name} must be integers, got {ids.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    if _is_readable(ids) and ids.numel() > 0:
        lowest, highest = (int(extreme) for extreme in ids.aminmax())
        if lowest < 0 or highest >= num_ids:
            got = lowest if lowest < 0 else highest
            raise ValueError(f"{where}: {name} must be in [0, {num_ids}), got {got}")
    return ids


def _is_readable(x: Tensor) -> bool:
    """Whether reading values of `x` is free: not on a device, not traced, not a fake tensor."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _same_dtype(tensors: list[Tensor]) -> list[Tensor]:
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(widest) for t in tensors]


def _shift_below_zero(x: Tensor, dim: int) -> Tensor:
    """Subtract the largest entry along `dim`, into a new tensor of at least fp32."""
    # A constant to autograd, since it cancels. Its dtype widens the difference without a copy.
    largest = x.detach().amax(dim, keepdim=True).to(_wide_dtype(x))
    # -inf - (-inf) is NaN: a slice of -inf alone is left as it is.
    return x - largest.masked_fill(largest == float("-inf"), 0.0)


def _total(exponentials: Tensor, dim: int) -> Tensor:
    # The largest entry adds exp(0) = 1, so only a slice of -inf alone can lie below the clamp.
    return exponentials.sum(dim, keepdim=True).clamp_min(1.0)
