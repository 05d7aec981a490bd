"""What ranks do in the tests of training that is interrupted; imports no pytest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_ranks import same
from fsdp_models import Case, start, train_step
from torch import Tensor, nn

from cs336_systems.parallel import STRATEGIES, checkpoint
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

FAULTY = 1
"""The rank in which things go wrong."""
CASE = Case(optimizer="adamw")


def prepare() -> None:
    """Import what training takes, which no later call's limit is then spent on."""
    for entry in STRATEGIES.values():
        if not entry.peer:
            entry.load()
    nn.Linear(1, 1)(torch.ones(1)).backward()
    torch.optim.AdamW([torch.ones(1)]).step()


def train(
    case: Case, steps: range, folder: str | None, *, resume: bool = False, strategy: str = "fsdp"
) -> dict[str, Any]:
    """Train with AdamW from what the folder has or from the start, and save into it."""
    model, optimizer, _ = start(case, strategy)
    if resume:
        assert folder is not None
        state, step = checkpoint.load(folder)
        assert step == steps.start
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    for step in steps:
        train_step(case, model, optimizer, step)
    if folder is not None and not resume:
        checkpoint.save(folder, _state(model, optimizer), step=steps.stop)
    return dict(model.full_state_dict())


def _state(model: DataParallel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.consolidate_state_dict(to=None)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }


def resumes_bitwise(strategy: str, folder: str) -> bool:
    """Tell whether training from the folder's step 1 ends as training from the start does."""
    got = train(CASE, range(1, 3), folder, resume=True, strategy=strategy)
    return same(got, train(CASE, range(3), None, strategy=strategy))


def fail_in_backward(strategy: str, folder: str, fault: str) -> None:
    """Train a step, save, and have one rank fail in the middle of the next backward pass."""
    model, optimizer, _ = start(CASE, strategy)
    train_step(CASE, model, optimizer, 0)
    checkpoint.save(folder, _state(model, optimizer), step=1)
    if dist.get_rank() == FAULTY:

        def fail_at_gradient(_: nn.Module, __: object, output: dict[str, Tensor]) -> None:
            output["x"].register_hook(FAULTS[fault])

        model.module.blocks[1].register_forward_hook(fail_at_gradient)
    train_step(CASE, model, optimizer, 1)


def train_uneven(strategy: str) -> None:
    """Train a step more on rank 0 than on the others, whose data have ended."""
    model, optimizer, _ = start(CASE, strategy)
    for step in range(2 if dist.get_rank() == FAULTY else 3):
        train_step(CASE, model, optimizer, step)


def _die(_: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_: Tensor) -> None:
    time.sleep(60)


def _raise(_: Tensor) -> None:
    raise LookupError("nothing at 42")


FAULTS: dict[str, Callable[[Tensor], None]] = {"dies": _die, "raises": _raise, "hangs": _hang}
