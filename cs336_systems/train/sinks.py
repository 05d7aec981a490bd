"""Other places where a run can be followed: TensorBoard and Weights & Biases, if asked for."""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cs336_systems.errors import bad
from cs336_systems.train.config import LoggingConfig, PipelineConfig, to_dict


class Sink(Protocol):
    """Takes the numbers of a logged step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Send or write what has been taken."""


def check_sinks(logging: LoggingConfig) -> None:
    """Check that what is asked for is installed, before an hour of training has gone by.

    Raises: UsageError naming the package.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(logging, name) and importlib.util.find_spec(name) is None:
            rule = f"be false where the package is not installed (pip install {name})"
            raise bad("logging", name, rule, True)


def open_sinks(config: PipelineConfig, folder: Path, last_step: int) -> list[Sink]:
    """Open the sinks that the config asks for; steps past `last_step` will come again."""
    sinks: list[Sink] = []
    if config.logging.tensorboard:
        sinks.append(_TensorBoard(folder / "tensorboard", last_step))
    if config.logging.wandb:
        sinks.append(_WeightsAndBiases(config, folder, last_step))
    return sinks


class _TensorBoard:
    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One run there for all processes of a run here; its own WANDB_MODE says where it goes."""

    def __init__(self, config: PipelineConfig, folder: Path, last_step: int) -> None:
        self._run = importlib.import_module("wandb").init(
            project=config.logging.wandb_project,
            name=config.name,
            config=to_dict(config),
            dir=str(folder),
            id=_run_id(folder / "wandb_id.txt", is_new=last_step == 0),
            resume="allow",
        )

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, *, is_new: bool) -> str:
    if is_new or not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")
