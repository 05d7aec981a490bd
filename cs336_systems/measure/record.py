"""The one schema of a measurement: what was run, on which clock, and how it ended.

A `Case` is known before anything runs; a `Record` is a case plus its outcome. A record that was
timed travels as the `extra_info` of its pytest-benchmark entry, whose `stats` hold the rounds in
seconds. A record that was not timed (out of memory, skipped, not installed) has no statistics, so
it travels in the JSON's own `cs336_systems.rows`, where pytest-benchmark's comparison never meets
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SCHEMA = "cs336-systems/1"

Status = Literal["ok", "oom", "skipped", "not_installed"]
Clock = Literal["wall_ms", "gpu_ms"]
Cache = Literal["warm", "cold"]
Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is about to be measured."""

    study: str
    """The family of cases that one table shows, e.g. `model_pass`."""
    params: Mapping[str, Scalar]
    """The swept parameters; together with `study` they identify the row."""
    clock: Clock = "wall_ms"
    """`wall_ms`: host clock, device synchronised at both ends. `gpu_ms`: CUDA events around the
    call."""
    cache: Cache = "warm"
    """`cold`: the device's L2 cache is flushed before every timed call."""
    rounds: int | None = None
    """Timed rounds; None takes the command line's number."""
    warmup_rounds: int | None = None
    """Untimed rounds before them; None takes the command line's number."""
    calls_per_round: int = 1
    """Calls that one round makes back to back; its time is that of one. More than one suits calls
    too short for the clock, and those that the host must launch faster than the device works."""
    tokens: int | None = None
    """Tokens that one timed call processes."""
    flops: float | None = None
    """Model floating-point operations of one timed call (recomputation not counted)."""
    flops_dtype: str | None = None
    """Which of the device's peak rates they are held against: fp32, tf32, fp16 or bf16."""
    least_bytes: int | None = None
    """Bytes that one timed call must move to or from the device's memory, whoever writes it."""
    baseline: Mapping[str, Scalar] | None = None
    """Parameters that, put over `params`, name the row that speed-up is reported against."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A case and its outcome, ready for JSON."""

    case: Case
    device: str
    status: Status = "ok"
    reason: str | None = None
    """One line: why the case was not timed."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers measured beside time, unit in the name: `peak_bytes`, `requested_bytes`,
    `max_abs_error`."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Numbers that the same code must repeat exactly: `operators`, `kernels`, `saved_bytes`."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Findings that are words, e.g. the dtype of an activation."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """The device's clocks and throttle reasons before and after the timed rounds."""
    timeline: Mapping[str, str] | None = None
    """What ran in each lane and when, in milliseconds, as `intervals.pack` writes it."""

    def to_json(self) -> dict[str, Any]:
        """Return the flat dictionary that travels in JSON."""
        case = asdict(replace(self.case, params={}, baseline=None))
        del case["params"]
        return {
            "schema": SCHEMA,
            **case,
            "case": dict(self.case.params),
            "baseline": dict(self.case.baseline) if self.case.baseline is not None else None,
            "device": self.device,
            "status": self.status,
            "reason": self.reason,
            "metrics": dict(self.metrics),
            "counts": dict(self.counts),
            "facts": dict(self.facts),
            "conditions": dict(self.conditions),
            **({} if self.timeline is None else {"timeline": dict(self.timeline)}),
        }
