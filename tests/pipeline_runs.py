"""Runs of the pipeline that take seconds, and training that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cs336_systems.train.config import PipelineConfig, from_dict, read_config, to_dict
from cs336_systems.train.loop import TrainResult


def small(folder: Path, **sections: dict[str, Any]) -> PipelineConfig:
    """Return a run of seconds; `sections` replace fields."""
    data: dict[str, dict[str, Any]] = {
        "corpus": {"megabytes": 0.05},
        "tokenizer": {"vocab_size": 300},
        "model": {"preset": "debug", "context_length": 16},
        "training": {"num_steps": 6, "warmup_steps": 2, "batch_size": 4, "device": "cpu"},
        "evaluation": {"num_batches": 1, "sample_tokens": 8},
        "logging": {"progress": False},
    }
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields}
    return from_dict(PipelineConfig, {"output_dir": str(folder / "out"), **data})


def written(config: PipelineConfig, folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return str(path)


class StandIn:
    """Training that takes no time, and remembers what it was given."""

    def __init__(self, *, stops_at: int | None = None) -> None:
        self.stops_at = stops_at
        self.calls: list[dict[str, Any]] = []

    def __call__(self, config: PipelineConfig, **given: Any) -> TrainResult:
        folder: Path = given["output_dir"]
        saved = read_config(PipelineConfig, folder / "config.json")
        self.calls.append({"config": config, "saved": saved, **given})
        for name in ("model.pt", "model_config.json", "sample.txt", "loss.png"):
            (folder / name).write_text("trained")
        return TrainResult(
            final_step=self.stops_at or config.training.num_steps,
            train_loss=2.0,
            validation_loss=None if self.stops_at else 1.5,
            perplexity=None if self.stops_at else 4.48,
            sample="Once there was a kite.",
            was_interrupted=self.stops_at is not None,
            log_path=folder / "log.jsonl",
            curve_path=folder / "loss.png",
            checkpoint_dir=folder / "checkpoints",
        )
