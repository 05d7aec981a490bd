"""What a run is made of, opened and checked: every rank has it, or every rank is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cs336_systems.attention import ATTENTION
from cs336_systems.config import ModelConfig
from cs336_systems.errors import bad
from cs336_systems.parallel.agreement import agreed
from cs336_systems.parallel.collectives import communication_device
from cs336_systems.table import has_compiler
from cs336_systems.train.config import PipelineConfig, TrainingConfig
from cs336_systems.train.sinks import check_sinks
from cs336_systems.train.state import identity
from cs336_systems.train.tokenizer import BpeTokenizer
from cs336_systems.train.tokens import load_info, load_tokens


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's config, with as many ranks as there are, and its data."""

    config: PipelineConfig
    model: ModelConfig
    device: torch.device
    tokenizer: BpeTokenizer
    train: np.ndarray
    validation: np.ndarray
    identity: dict[str, Any]
    output_dir: Path


def open_inputs(
    config: PipelineConfig,
    *,
    tokenizer: BpeTokenizer,
    train_tokens: Path,
    validation_tokens: Path,
    output_dir: Path,
) -> Inputs:
    """Open a run's data for the ranks of the default process group.

    Raises: UsageError, on every rank, for what cannot be trained here or differs between ranks.
    """

    def check() -> tuple[Inputs, list[str]]:
        here = replace(config, training=on_this_group(config.training))
        device = check_device(here.training)
        check_sinks(here.logging)
        model = here.model.config(tokenizer.vocab_size)
        train, validation = (
            load_tokens(
                path, tokenizer_sha256=tokenizer.sha256, context_length=model.context_length
            )
            for path in (train_tokens, validation_tokens)
        )
        run = identity(here, tokenizer.vocab_size, tokenizer.sha256, load_info(train_tokens).sha256)
        inputs = Inputs(
            config=here,
            model=model,
            device=device,
            tokenizer=tokenizer,
            train=train,
            validation=validation,
            identity=run,
            output_dir=output_dir,
        )
        validated = load_info(validation_tokens).sha256
        return inputs, [str(here), str(output_dir), *map(str, run.items()), validated]

    return agreed("train", check, None)


def on_this_group(training: TrainingConfig) -> TrainingConfig:
    """Return the config for the ranks there are; one that asks for no number takes them all.

    Raises: UsageError when it asks for another number, or what it says does not suit this one.
    """
    world_size = dist.get_world_size()
    if training.num_ranks not in (1, world_size):
        rule = f"be the {world_size} that were started (torchrun --nproc-per-node starts more)"
        raise bad("training", "num_ranks", rule, training.num_ranks)
    return replace(training, num_ranks=world_size)


def check_device(training: TrainingConfig) -> torch.device:
    """Return the device of this rank.

    Raises: UsageError when it is not the config's, or cannot run what the config asks for.
    """
    device = communication_device()
    if training.device not in (None, device.type):
        rule = f"be that of the process group, {device.type} with {dist.get_backend()}"
        raise bad("training", "device", rule, training.device)
    dtype = training.precision
    unmet = ATTENTION[training.attention_kernel].unmet(device=device.type, dtype=dtype)
    if unmet is not None:
        rule = f"be able to run here ({unmet.reason})"
        raise bad("training", "attention_kernel", rule, training.attention_kernel)
    if training.compile != "eager" and not has_compiler():
        raise bad("training", "compile", "be eager without a C++ compiler", training.compile)
    return device
