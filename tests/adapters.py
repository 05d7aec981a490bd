"""Where the course's tests find this package's implementations."""

from __future__ import annotations

import torch


def get_flashattention_autograd_function_pytorch() -> type[torch.autograd.Function]:
    """Return the tiled attention in plain PyTorch."""
    from cs336_systems.attention.flash_torch import FlashAttentionTorch

    return FlashAttentionTorch


def get_flashattention_autograd_function_triton() -> type[torch.autograd.Function]:
    """Return the attention whose tiles are Triton kernels."""
    from cs336_systems.attention.flash_triton import FlashAttentionTriton

    return FlashAttentionTriton
