"""Where the course's tests find this package's implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def get_flashattention_autograd_function_pytorch() -> type[torch.autograd.Function]:
    """Return the tiled attention in plain PyTorch."""
    from cs336_systems.attention.flash_torch import FlashAttentionTorch

    return FlashAttentionTorch


def get_flashattention_autograd_function_triton() -> type[torch.autograd.Function]:
    """Return the attention whose tiles are Triton kernels."""
    from cs336_systems.attention.flash_triton import FlashAttentionTriton

    return FlashAttentionTriton


# Data parallelism. Modules of the course may leave parameters unused, which is allowed here.


def get_ddp_individual_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap with one overlapped all-reduce per parameter (2025)."""
    from cs336_systems.parallel import wrap

    return wrap(module, "overlapped", find_unused=True)


def ddp_individual_parameters_on_after_backward(
    ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Wait for the reductions."""
    ddp_model.finish_gradient_synchronization()


def get_ddp_bucketed(module: torch.nn.Module, bucket_size_mb: float | None) -> torch.nn.Module:
    """Wrap with one overlapped all-reduce per bucket (2025)."""
    from cs336_systems.parallel import wrap

    return wrap(module, "flashddp", bucket_size_mb=bucket_size_mb, find_unused=True)


def ddp_bucketed_on_after_backward(
    ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Wait for the reductions."""
    ddp_model.finish_gradient_synchronization()


def ddp_bucketed_on_train_batch_start(
    ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Do nothing: a step begins with its forward pass."""


def get_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap with one overlapped all-reduce per parameter (2026)."""
    return get_ddp_individual_parameters(module)


def ddp_on_after_backward(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Wait for the reductions."""
    ddp_model.finish_gradient_synchronization()


def get_sharded_optimizer(
    params: Iterable[Any], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    """Return an optimizer that keeps its state for this rank's part of the parameters."""
    from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

    return ShardedOptimizer(params, optimizer_cls, **kwargs)


def get_fsdp(module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Wrap with sharded weights (2026)."""
    from cs336_systems.parallel import wrap

    return wrap(module, "fsdp", compute_dtype=compute_dtype, find_unused=True)


def fsdp_on_after_backward(fsdp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Wait for the reductions."""
    fsdp_model.finish_gradient_synchronization()


def fsdp_gather_full_params(fsdp_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter of the wrapped module, whole, by its name."""
    state = fsdp_model.full_state_dict()
    return {name: state[name] for name, _ in fsdp_model.module.named_parameters()}
