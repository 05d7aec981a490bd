"""What a strategy's communication costs: its steps held against those of ranks that train alone,
and against the row of torch's that does the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_STUDIES = ("data_parallel", "data_parallel_buckets", "scaling")
_SCALING = "scaling"
_MATRIX = "lm_matrix"
_BASELINE = "none"
_PEERS = {
    "naive": "torch_ddp",
    "flat": "torch_ddp",
    "overlapped": "torch_ddp",
    "flashddp": "torch_ddp",
    "flashddp_ce": "torch_ddp",
    "zero1": "torch_zero",
    "fsdp": "torch_fsdp2",
}


def add_comparisons(rows: Sequence[Row]) -> None:
    """Give each timed step the time that communication adds to it, and its ratios to others."""
    timed = [row for row in rows if row["study"] in _STUDIES and row["median_ms"]]
    by_setting = {_setting(row, row["case"].get("strategy"), _bucket(row)): row for row in timed}
    for row in timed:
        strategy = row["case"].get("strategy")
        alone = by_setting.get(_setting(row, _BASELINE, None))
        if alone is not None and strategy != _BASELINE:
            row["metrics.exposed_ms"] = row["median_ms"] - alone["median_ms"]
            row["metrics.over_none"] = row["median_ms"] / alone["median_ms"]
        peer = by_setting.get(_setting(row, _PEERS.get(strategy), _bucket(row)))
        if peer is not None:
            row["metrics.over_peer"] = row["median_ms"] / peer["median_ms"]
    _add_to_matrix(rows)
    _add_to_scaling(timed, by_setting)


def _add_to_matrix(rows: Sequence[Row]) -> None:
    """Give each short training run its tokens/s over those of one rank alone."""
    timed = [row for row in rows if row["study"] == _MATRIX and row["tokens_per_s"]]
    alone = {_run(row): row for row in timed if row["case"].get("strategy") == _BASELINE}
    for row in timed:
        if (one := alone.get(_run(row))) is not None:
            row["metrics.over_alone"] = row["tokens_per_s"] / one["tokens_per_s"]


def _add_to_scaling(timed: Sequence[Row], by_setting: Mapping[tuple[Any, ...], Row]) -> None:
    """Give each step its tokens/s over those of one rank alone, and what was to be expected of it:
    all that is sent while the ranks compute as if alone."""
    steps = [row for row in timed if row["study"] == _SCALING]
    is_one = {"strategy": _BASELINE, "ranks": 1}
    ones = {_problem(row): row for row in steps if is_one.items() <= row["case"].items()}
    for row in steps:
        one, ranks = ones.get(_problem(row)), row["case"].get("ranks")
        if one is not None and ranks and row["tokens_per_s"] and one["tokens_per_s"]:
            row["metrics.speedup"] = row["tokens_per_s"] / one["tokens_per_s"]
            row["metrics.efficiency"] = row["metrics.speedup"] / ranks
        alone = by_setting.get(_setting(row, _BASELINE, None))
        sent_ms = row.get("metrics.predicted_communication_ms")
        if alone is not None and sent_ms is not None:
            row["metrics.predicted_ms"] = max(alone["median_ms"], sent_ms)


def _problem(row: Row) -> tuple[Any, ...]:
    """Return what a step shares with that of one rank alone: the batch of a rank, or of all."""
    case = dict(row["case"])
    ranks, batch = case.pop("ranks", None), case.pop("batch", None)
    case.pop("strategy", None)
    if case.get("scaling") == "strong" and ranks and batch:
        batch *= ranks
    return (row["hardware"].identity(), batch, json.dumps(case, sort_keys=True))


def _run(row: Row) -> tuple[Any, ...]:
    """Return what a run shares with that of one rank alone."""
    rest = {name: v for name, v in row["case"].items() if name not in ("strategy", "ranks")}
    return (row["hardware"].identity(), json.dumps(rest, sort_keys=True))


def _bucket(row: Row) -> Any:
    return row["case"].get("bucket_mb")


def _setting(row: Row, strategy: Any, bucket_mb: Any) -> tuple[Any, ...]:
    """Return what identifies the step of a strategy in the same setting as a row's."""
    case = {**row["case"], "strategy": strategy, "bucket_mb": bucket_mb}
    return (row["hardware"].identity(), row["study"], json.dumps(case, sort_keys=True))
