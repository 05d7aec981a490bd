"""FlashAttention-2 on Triton kernels, forward and backward, as a torch operator and a Function.

The kernels are in `triton_forward` and `triton_backward`, their tiles in `tiles`. Saved for
backward are the inputs, O and L, nothing else. Runs on CUDA devices, and on the CPU in Triton's
interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cs336_systems.attention.arguments import check_arguments, scale_or_default
from cs336_systems.attention.autograd import (
    autocast_inputs,
    distinct,
    forbid_second_derivative,
)
from cs336_systems.attention.triton_run import PORTABLE, backward, empty_like, forward
from cs336_systems.errors import bad
from cs336_systems.table import interpreting

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def flash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Return softmax(scale * q k^T + mask) v; memory grows with the sequence, not its square.

    `deterministic` makes gradients bitwise repeatable at the cost of a second backward pass; so
    does `torch.use_deterministic_algorithms(True)`.
    Shapes: q (..., num_queries, head_dim), k and v (..., num_keys, head_dim) -> q's shape. The last
    dimension must be contiguous, others may have any strides. Grouped heads as in `attention`.
    Raises: UsageError naming what does not fit.
    """
    return FlashAttentionTriton.apply(q, *distinct(k, v), is_causal, scale, deterministic)


class FlashAttentionTriton(torch.autograd.Function):
    """`apply(q, k, v, is_causal=False, scale=None, deterministic=False, kernels="portable")`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        scale: float | None = None,
        deterministic: bool = False,
        kernels: str = PORTABLE,
    ) -> Tensor:
        """Compute O; keep q, k, v, O and L."""
        q, k, v = autocast_inputs(q, k, v)
        ctx.is_causal = is_causal
        ctx.scale = scale_or_default(scale, q.shape[-1])
        ctx.deterministic, ctx.kernels = deterministic, kernels
        if _at_once(q):
            o, lse, ctx.trail = forward(
                q, k, v, is_causal, ctx.scale, check_kernel_arguments, kernels=kernels
            )
        else:
            check_kernel_arguments(q, k, v)
            o, lse = flash_attention_forward(q, k, v, is_causal, ctx.scale, kernels)
            ctx.trail = None
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        q, k, v, o, lse = ctx.saved_tensors
        settings = ctx.is_causal, ctx.scale, ctx.deterministic
        if _at_once(do):
            gradients = backward(
                do, q, k, v, o, lse, *settings, kernels=ctx.kernels, trail=ctx.trail
            )
        else:
            gradients = flash_attention_backward(do, q, k, v, o, lse, *settings, ctx.kernels)
        return *forbid_second_derivative(gradients, q, k, v, do), None, None, None, None


def check_kernel_arguments(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise the UsageError that names what the kernels cannot take."""
    check_arguments(q, k, v)
    if q.dtype not in _DTYPES:
        raise bad("attention", "query", "have dtype float16, bfloat16 or float32", q.dtype)
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        rule = f"have a head dim from 1 to {MAX_HEAD_DIM}"
        raise bad("attention", "query", rule, q.shape[-1])
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            rule = "have a contiguous last dimension (stride 1)"
            raise bad("attention", name, rule, tensor.stride())
    if q.device.type != "cuda" and q.device.type != "meta":
        if not interpreting():
            rule = "be on a CUDA device, or on the CPU with TRITON_INTERPRET=1"
            raise bad("attention", "query", rule, str(q.device))
        if q.dtype == torch.bfloat16:
            rule = (
                "be on a CUDA device to have dtype bfloat16, which Triton's interpreter gets wrong"
            )
            raise bad("attention", "query", rule, str(q.device))


def _at_once(tensor: Tensor) -> bool:
    """Tell whether to launch kernels now: not while tracing, nor for tensors without memory."""
    if type(tensor) not in _PLAIN_TYPES or tensor.is_meta:
        return False
    return not torch.compiler.is_compiling()


# --- the same as operators, which tracing can see ---


@torch.library.custom_op("cs336_systems::flash_attention_forward", mutates_args=())
def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, kernels: str = PORTABLE
) -> tuple[Tensor, Tensor]:
    """Return O and L, the natural-log log-sum-exp of each row of scaled scores.

    Shapes: O as q, L (..., num_queries) in fp32.
    """
    check_kernel_arguments(q, k, v)
    return forward(q, k, v, is_causal, scale, kernels=kernels)[:2]


@flash_attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, kernels: str = PORTABLE
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("cs336_systems::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    deterministic: bool,
    kernels: str = PORTABLE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV."""
    return backward(do, q, k, v, o, lse, is_causal, scale, deterministic, kernels=kernels)


@flash_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    is_causal: bool, scale: float, deterministic: bool, kernels: str = PORTABLE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.is_causal, ctx.scale, ctx.kernels = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse)


def _differentiate(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse = ctx.saved_tensors
    dq, dk, dv = flash_attention_backward(
        do, q, k, v, o, lse, ctx.is_causal, ctx.scale, deterministic=False, kernels=ctx.kernels
    )
    return dq, dk, dv, None, None, None


flash_attention_forward.register_autograd(_differentiate, setup_context=_save)
