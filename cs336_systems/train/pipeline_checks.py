"""What can be known to go wrong before any work is done."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cs336_systems.attention import ATTENTION
from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel import STRATEGIES
from cs336_systems.table import has_compiler
from cs336_systems.train.config import PipelineConfig, TrainingConfig, read_config, to_dict
from cs336_systems.train.corpus import source_files
from cs336_systems.train.sinks import check_sinks
from cs336_systems.train.state import check_identity, identity


def with_ranks_of_environment(config: PipelineConfig) -> PipelineConfig:
    """Return the config with the number of ranks that a launcher has started, if one has.

    Raises: UsageError when the config asks for another number, or its strategy does not
        communicate.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    asked = config.training.num_ranks
    if started == 1 or started == asked:
        return config
    if asked > 1:
        raise bad("training", "num_ranks", f"be the {started} ranks that were launched", asked)
    return replace(config, training=replace(config.training, num_ranks=started))


def check_before_work(config: PipelineConfig, folder: Path, *, skip_data: bool) -> None:
    """Check what can be checked without the data.

    Raises: UsageError for devices, implementations or files that are not there, and for a folder
        whose checkpoints are of another run.
    """
    _check_devices(config.training)
    _check_implementations(config.training)
    check_sinks(config.logging)
    if not skip_data:
        source_files(config.corpus)
    if config.checkpointing.resume and any(folder.glob("checkpoints/*")):
        _check_same_run(config, folder / "config.json")


def _device_of(training: TrainingConfig) -> str:
    return training.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_devices(training: TrainingConfig) -> None:
    if _device_of(training) == "cpu":
        return
    found = torch.cuda.device_count()
    if not found:
        raise bad("training", "device", "be cpu or null where no CUDA device is", training.device)
    if training.num_ranks > found:
        plural = "" if found == 1 else "s"
        rule = f"be at most the {found} CUDA device{plural} here, or training.device be cpu"
        raise bad("training", "num_ranks", rule, training.num_ranks)


def _check_implementations(training: TrainingConfig) -> None:
    device = _device_of(training)
    kernel = ATTENTION[training.attention_kernel]
    if (unmet := kernel.unmet(device=device, dtype=training.precision)) is not None:
        rule = f"run here: {unmet.reason}"
        raise bad("training", "attention_kernel", rule, training.attention_kernel)
    if (unmet := STRATEGIES[training.ddp_wrapper].unmet(device=device)) is not None:
        raise bad("training", "ddp_wrapper", f"run here: {unmet.reason}", training.ddp_wrapper)
    if training.compile != "eager" and not has_compiler():
        raise bad("training", "compile", "be eager without a C++ compiler", training.compile)


def _check_same_run(config: PipelineConfig, path: Path) -> None:
    """Refuse another run's checkpoints before its tokens are replaced, and they with them."""
    if not path.exists():
        return
    try:
        saved = read_config(PipelineConfig, path)
    except UsageError:
        # Of another version: training itself compares with the checkpoint.
        return
    check_identity(_identity(saved), _identity(config))


def _identity(config: PipelineConfig) -> dict[str, Any]:
    sections = {"tokenizer": config.tokenizer, "corpus": config.corpus}
    data = {
        f"{name}.{field}": value
        for name, section in sections.items()
        for field, value in to_dict(section).items()
        if field != "download_dir"
    }
    # What the data comes to is known later; here the same for both.
    return data | identity(config, config.tokenizer.vocab_size, "", "")
