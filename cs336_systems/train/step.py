"""One optimizer step: micro-batches, schedule, clipping, without a word from the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW, get_cosine_lr
from torch import Tensor
from torch.optim import Optimizer

from cs336_systems.parallel.base import DataParallel
from cs336_systems.train.config import TrainingConfig


def build_optimizer(model: DataParallel, training: TrainingConfig) -> Optimizer:
    """Make the config's optimizer of all that is trainable."""
    settings: dict[str, Any] = {
        "lr": training.max_learning_rate,
        "betas": training.betas,
        "eps": training.eps,
        "weight_decay": training.weight_decay,
    }
    if training.optimizer == "torch_adamw":
        return model.build_optimizer(torch.optim.AdamW, fused=True, **settings)
    return model.build_optimizer(AdamW, **settings)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Return the rate of a step, counted from 1: at its largest after the warm-up, at its smallest
    in the last."""
    return get_cosine_lr(
        step,
        training.max_learning_rate,
        training.min_learning_rate,
        training.warmup_steps,
        training.num_steps,
    )


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Enclose what is computed in the config's precision."""
    if training.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


class Stepper:
    """Takes the steps of one run; losses and norms are returned where they are, on the device."""

    def __init__(
        self,
        model: DataParallel,
        optimizer: Optimizer,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.training = model, optimizer, training
        self._device = device

    def step(self, step: int, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Train on this rank's batch; returns its mean loss and the gradients' norm before
        clipping, if they are clipped.

        Shapes: batch (2, sequences, context_length), inputs and then targets.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        self.model.finish_gradient_synchronization()
        norm = None
        if self.training.max_grad_norm > 0:
            norm = self.model.clip_grad_norm(self.training.max_grad_norm)
        self.optimizer.step()
        return loss, norm

    def _backward(self, batch: Tensor) -> Tensor:
        """Add up the gradients of all micro-batches; the last one's backward pass sends them."""
        num_micro_batches = self.training.num_micro_batches
        total = None
        for index, (inputs, targets) in enumerate(batch.chunk(num_micro_batches, dim=1)):
            is_last = index == num_micro_batches - 1
            with nullcontext() if is_last else self.model.no_sync():
                with autocast(self.training, self._device):
                    loss = cross_entropy(self.model(inputs), targets) / num_micro_batches
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total
