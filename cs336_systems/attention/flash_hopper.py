"""FlashAttention on warp-specialised kernels for Hopper, and the choice between them and the
portable ones."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
import triton
from torch import Tensor

from cs336_systems.attention.arguments import check_arguments, scale_or_default
from cs336_systems.attention.autograd import autocast_inputs, distinct
from cs336_systems.attention.flash_triton import FlashAttentionTriton
from cs336_systems.attention.triton_direct import KNOWN_TRITON
from cs336_systems.attention.triton_launch import TMA_FLOPS
from cs336_systems.attention.triton_run import HOPPER, PORTABLE
from cs336_systems.errors import UsageError, unknown

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (9, 0)
_logger = logging.getLogger(__name__)
KERNELS = ("auto", PORTABLE, HOPPER)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
    kernels: Literal["auto", "portable", "hopper"] = "auto",
) -> Tensor:
    """As `flash_attention_triton`, on the Hopper kernels where they take the inputs and the device
    rather than the host decides how long that takes.

    Elsewhere one line in the log says why, once.
    Raises: UsageError naming what does not fit; with kernels="hopper" also what they do not take.
    """
    if kernels not in KERNELS:
        raise unknown("flash_attention", "kernels", KERNELS, kernels)
    reason = None
    if kernels == "auto":
        reason = unfit(autocast_inputs(q)[0], scale) or short(q, k)
        if reason is not None:
            _say_once(reason)
    if kernels == HOPPER or (kernels == "auto" and reason is None):
        return flash_attention_hopper(
            q, k, v, is_causal=is_causal, scale=scale, deterministic=deterministic
        )
    return FlashAttentionTriton.apply(q, *distinct(k, v), is_causal, scale, deterministic)


def flash_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """As `flash_attention_triton`, on an H100, H200 or GH200 in half precision, head dim 64 or 128.

    `deterministic` takes the portable kernels' backward pass. Inputs that the tensor memory
    accelerator cannot load where they are (rows not at multiples of 16 bytes) are copied first.
    Raises: UsageError naming what does not fit.
    """
    check_arguments(q, k, v)
    if (reason := unfit(autocast_inputs(q)[0], scale)) is not None:
        raise UsageError(f"flash_attention_hopper: {reason}")
    return FlashAttentionTriton.apply(q, *distinct(k, v), is_causal, scale, deterministic, HOPPER)


def unfit(q: Tensor, scale: float | None) -> str | None:
    """Return which rule a query breaks: argument, rule and what was got; None if none."""
    if q.device.type != "cuda":
        return f"query must be on a CUDA device, got {q.device}"
    if (found := torch.cuda.get_device_capability(q.device)) != CAPABILITY:
        return f"device must have compute capability 9.0, got {found[0]}.{found[1]}"
    if not triton.__version__.startswith(KNOWN_TRITON):
        return f"Triton must be {KNOWN_TRITON}x, got {triton.__version__}"
    if q.dtype not in DTYPES:
        return f"query must have dtype float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"query must have a head dim of 64 or 128, got {q.shape[-1]}"
    if scale_or_default(scale, q.shape[-1]) <= 0:
        return f"scale must be positive, got {scale}"
    return None


def short(q: Tensor, k: Tensor) -> str | None:
    """Return how little there is to compute where describing tensors takes longer, else None."""
    flops = 4 * q.numel() * k.shape[-2]
    if flops >= TMA_FLOPS:
        return None
    return f"a call must have {TMA_FLOPS:.0e} FLOPs to be worth more of the host's time"


@functools.cache
def _say_once(reason: str) -> None:
    _logger.info("flash_attention: portable kernels, since %s", reason)
