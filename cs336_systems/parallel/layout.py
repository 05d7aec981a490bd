"""How gradients lie in memory: the order in which their elements travel.

A collective sees a run of memory. Ranks may exchange gradients of transposed or channels-last
parameters as they lie, because every rank's gradient is first brought to its parameter's layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cs336_systems.errors import UsageError


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill a run of memory, each place once, in whatever order."""
    expected = 1
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dims:
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


def in_memory_order(tensor: Tensor) -> Tensor:
    """View a dense tensor as the run of memory that it is.

    Shapes: any -> (numel,).
    """
    return tensor.as_strided((tensor.numel(),), (1,))


def gradient_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the strides autograd gives the gradient: the parameter's if it is dense, else rows."""
    if is_dense(parameter):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def laid_out_gradient(
    parameter: nn.Parameter, strides: tuple[int, ...] | None = None
) -> Tensor:  # fmt: skip
    """Return the gradient in its parameter's layout and in memory of its own, made so if it was
    not; zeros if there was none.

    strides: the parameter's `gradient_strides`, if they are known.
    Raises: UsageError for a sparse gradient.
    """
    grad = parameter.grad
    strides = gradient_strides(parameter) if strides is None else strides
    if grad is not None and has_strides(grad, strides) and is_alone(grad):
        return grad
    fresh = torch.empty_strided(
        parameter.shape, strides, dtype=parameter.dtype, device=parameter.device
    )
    parameter.grad = fresh.zero_() if grad is None else fresh.copy_(check_strided(grad))
    return parameter.grad


def has_strides(grad: Tensor, strides: tuple[int, ...]) -> bool:
    """Tell whether the gradient already lies as wanted."""
    return grad.layout == torch.strided and grad.stride() == strides


def is_alone(tensor: Tensor) -> bool:
    """Tell whether no other tensor uses its memory.

    Autograd gives a parameter the tensor that arrives, without a copy, even where that is a view
    of what other parameters get as well or of what the rest of the backward pass has yet to read
    (pytorch/pytorch#34082). Such a gradient must not be reduced where it lies.
    """
    return _num_uses(tensor) <= _NUM_USES_ALONE


def _num_uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


# Python's own handles of a storage count as well.
_NUM_USES_ALONE = _num_uses(torch.empty(1))


def check_strided(grad: Tensor) -> Tensor:
    """Return the gradient, which must not be sparse and is no part of a graph here."""
    if grad.layout != torch.strided:
        raise UsageError(f"data parallel: gradients must be dense, got layout {grad.layout}")
    return grad.detach()


def without_repeats(tensor: Tensor) -> Tensor:
    """View an expanded tensor as what is there in memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
