"""The last stage: training in this process, as one of torchrun's ranks, or on ranks of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cs336_systems.errors import UsageError
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.atomic import replacing
from cs336_systems.train.config import PipelineConfig, to_dict
from cs336_systems.train.data_stages import Data
from cs336_systems.train.loop import TrainResult, train
from cs336_systems.train.rank_launcher import Launched, launch
from cs336_systems.train.rank_turn import is_launched
from cs336_systems.train.run_folder import StoppedError
from cs336_systems.train.stages import Stage

Train = Callable[..., TrainResult]
_OUTPUTS = ("model.pt", "model_config.json", "sample.txt", "loss.png", "result.json")
_BACKENDS = {None: None, "cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Training:
    """Training of one config into its folder; `train` is what each rank calls."""

    config: PipelineConfig
    folder: Path
    train: Train = train

    @property
    def config_path(self) -> Path:
        """The config as resolved."""
        return self.folder / "config.json"

    @property
    def result_path(self) -> Path:
        """What the last run came to."""
        return self.folder / "result.json"

    def stage(self, data: Data) -> Stage:
        """Return training as a stage, whose record rank 0 writes when the last step is done."""
        return Stage(
            name="training",
            folder=self.folder,
            inputs={
                "tokenizer": data.tokenizer.sha256,
                "tokens": [info.sha256 for info in data.infos.values()],
                "model": to_dict(self.config.model),
                "training": to_dict(self.config.training),
                "evaluation": to_dict(self.config.evaluation),
            },
            outputs=tuple(self.folder / name for name in _OUTPUTS),
        )

    def reason_to_run(self, data: Data) -> str | None:
        """Return why training has something to do, or None."""
        if not self.config.checkpointing.resume:
            return "checkpointing.resume is false"
        return self.stage(data).reason_to_run()

    def run(self, data: Data) -> int:
        """Train and return the exit status.

        Raises: UsageError as `train`, StoppedError when stopped before there was something to save.
        """
        with replacing(self.config_path) as file:
            file.write(json.dumps(to_dict(self.config), indent=2).encode() + b"\n")
        if self.config.training.num_ranks == 1 or is_launched():
            return self.as_rank(data)
        command = [sys.executable, "-m", "cs336_systems.train.pipeline_rank", str(self.config_path)]
        return exit_status(launch(command, self.config.training.num_ranks))

    def as_rank(self, data: Data) -> int:
        """Train as the rank that this process is, and return its exit status."""
        with init_from_environment(_BACKENDS[self.config.training.device]) as info:
            try:
                result = self.train(
                    self.config,
                    tokenizer=data.tokenizer,
                    train_tokens=data.paths["train"],
                    validation_tokens=data.paths["validation"],
                    output_dir=self.folder,
                )
            except (UsageError, CheckpointError) as error:
                if info.world_size == 1:
                    raise
                # Leaving the group in order would wait for ranks that wait for this one.
                print(error, file=sys.stderr, flush=True)
                os._exit(2)
            if info.rank == 0:
                self._finish(result, data)
        return 0

    def _finish(self, result: TrainResult, data: Data) -> None:
        with replacing(self.result_path) as file:
            described = json.dumps(asdict(result), indent=2, default=str, ensure_ascii=False)
            file.write(described.encode() + b"\n")
        if result.was_interrupted:
            step = f"step {result.final_step} of {self.config.training.num_steps}"
            again = (
                "the same command" if self.config.checkpointing.resume else "checkpointing.resume"
            )
            print(f"training: stopped at {step} and saved; {again} goes on from there", flush=True)
            return
        self.stage(data).record()
        self.show()

    def show(self) -> int:
        """Print what the finished run came to, and return the exit status."""
        result: dict[str, Any] = json.loads(self.result_path.read_bytes())
        print(
            f"training: step {result['final_step']}, train loss {result['train_loss']:.3f}, "
            f"validation loss {result['validation_loss']:.3f} "
            f"(perplexity {result['perplexity']:.2f})"
        )
        print(f"files: {self.folder}/ (model.pt, loss.png, log.jsonl, checkpoints/)")
        print(f"sample: {result['sample']}", flush=True)
        return 0


def exit_status(launched: Launched) -> int:
    """Say which rank failed, unless rank 0 has said it for all, and return the exit status."""
    failed = [rank for rank in launched.ranks if rank.status]
    if failed and launched.stopped_by is not None:
        raise StoppedError(launched.stopped_by)
    # Rank 0 has said on the terminal what was the user's fault; others mostly say the same.
    unsaid = [rank for rank in failed if launched.ranks[0].status != 2 or rank.status != 2]
    for rank in unsaid:
        print(
            f"training: rank {rank.rank} of {len(launched.ranks)} ended with status {rank.status}"
            + (f", its last lines:\n{rank.printed}" if rank.printed else ""),
            file=sys.stderr,
        )
    return 2 if any(rank.status == 2 for rank in failed) else int(bool(failed))
