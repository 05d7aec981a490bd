"""What a checkpoint of a training run holds: all of it, whole, so that it loads anywhere.

Weights and optimizer are as the plain module's, whatever strategy trained them; the random states
are those of every rank. What the run is must be as it was; how it is run may change.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from cs336_systems.errors import UsageError
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import all_gather_object
from cs336_systems.train.config import PipelineConfig, to_dict

# What may be different after a resume: how long, where and how well watched the run is.
_FREE = (
    *("num_steps", "num_ranks", "ddp_wrapper", "ddp_options"),
    *("micro_batch_size", "device"),
)


def identity(
    config: PipelineConfig, vocab_size: int, tokenizer_sha256: str, tokens_sha256: str
) -> dict[str, Any]:
    """Return what makes a run the same run, by names fit for an error."""
    model = to_dict(config.model.config(vocab_size))
    training = {k: v for k, v in to_dict(config.training).items() if k not in _FREE}
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"training.{name}": value for name, value in training.items()},
        "the tokenizer's sha256": tokenizer_sha256,
        "the training tokens' sha256": tokens_sha256,
    }


def check_identity(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of this run.

    Raises: UsageError naming the first field that differs.
    """
    for name in (*saved, *mine):
        if saved.get(name) != mine.get(name):
            raise UsageError(
                f"resume: {name} must be {saved.get(name)!r} as in the checkpoint, "
                f"got {mine.get(name)!r}; another output_dir, or checkpointing.resume=false, "
                "starts anew"
            )


def capture(model: DataParallel, optimizer: Optimizer, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole state with what it is `about`, on rank 0 at least; call it on every rank.

    Cost: for sharded strategies the whole model and optimizer on every rank's device.
    """
    return {
        **about,
        "model": dict(model.full_state_dict()),
        "optimizer": model.full_optimizer_state_dict(optimizer),
        "rng": all_gather_object(_rng(next(model.parameters()).device)),
    }


def restore(state: Mapping[str, Any], model: DataParallel, optimizer: Optimizer) -> None:
    """Load a captured state, on every rank."""
    model.load_full_state_dict(state["model"])
    model.load_full_optimizer_state_dict(optimizer, state["optimizer"])
    # A rank that did not exist then keeps the state it was seeded with.
    if model.rank < len(state["rng"]):
        _restore_rng(state["rng"][model.rank])


def seed_rank(seed: int, rank: int) -> None:
    """Give a rank random numbers of its own."""
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)


def _rng(device: torch.device) -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
