"""What ranks do in the tests of training that is interrupted; imports no pytest."""

from __future__ import annotations

from typing import Any

import torch
from fsdp_models import Case, start, train_step

from cs336_systems.parallel import checkpoint


def train(case: Case, steps: range, folder: str | None, *, resume: bool = False) -> dict[str, Any]:
    """Train with AdamW from what the folder has or from the start, and save into it."""
    model, optimizer, _ = start(case)
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
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(folder, state, step=steps.stop)
    return dict(model.full_state_dict())
