"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


def get_cosine_lr(
    it: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    cosine_cycle_iters: int,
) -> float:
    """Learning rate of step `it`: a linear rise, half a cosine down, then the minimum for good.

    Raises: ValueError for a negative step or a cycle that ends before the warm-up does.
    Source: Loshchilov and Hutter, "SGDR", eq. 5.
    """
    if it < 0:
        raise ValueError(f"get_cosine_lr: it must be >= 0, got {it!r}")
    if not 0 <= warmup_iters <= cosine_cycle_iters:
        raise ValueError(
            "get_cosine_lr: warmup_iters must be between 0 and cosine_cycle_iters "
            f"{cosine_cycle_iters}, got {warmup_iters!r}"
        )
    if it < warmup_iters:
        return max_learning_rate * it / warmup_iters
    if it >= cosine_cycle_iters:
        return min_learning_rate
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    height = (1 + math.cos(math.pi * progress)) / 2
    return min_learning_rate + height * (max_learning_rate - min_learning_rate)


class AdamW(torch.optim.Optimizer):
    """Adam with weight decay applied to the parameter itself.

    Per parameter the state holds `step` (a plain int), `exp_avg` and `exp_avg_sq`, the moments in
    the parameter's dtype and on its device.
    Cost: one temporary of the size of the parameter being stepped.
    Raises: ValueError for hyperparameters outside their range, complex parameters and sparse
        gradients.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with hyperparameters of its own; what it leaves out is as constructed."""
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse or parameter.is_complex():
            kind = "sparse" if gradient.is_sparse else str(parameter.dtype)
            raise ValueError(f"AdamW: gradients must be dense and real, got {kind}")
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        # int(): a state dict of torch.optim.AdamW holds a tensor here.
        state["step"] = step = int(state["step"]) + 1
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2) = group["lr"], group["betas"]

        parameter.mul_(1 - lr * group["weight_decay"])
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Both moments start at zero; dividing by 1 - beta^step undoes that bias.
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
        parameter.addcdiv_(exp_avg, denominator, value=-lr / correction1)


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"AdamW: {name} must be finite and >= 0, got {group[name]!r}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {group['betas']!r}")
