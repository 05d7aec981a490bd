"""How values are written: significant digits, units in headers, an outcome in place of a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from cs336_systems.report.frame import missing

NOTHING = "-"
STATUS = {"oom": "OOM", "skipped": "skipped", "not_installed": "not installed"}
CLOCKS = {
    "wall_ms": "`wall_ms`, the host's, with the device synchronised at both ends",
    "gpu_ms": "`gpu_ms`, the GPU's own, by events around the call",
}
CACHES = {
    "warm": "warm, as the call before left it",
    "cold": "cold, L2 flushed before every call",
}

_HEADERS = {
    "median_ms": "median (ms)",
    "mean_ms": "mean (ms)",
    "std_ms": "std (ms)",
    "q20_ms": "q20 (ms)",
    "q80_ms": "q80 (ms)",
    "min_ms": "min (ms)",
    "data_ms": "round (ms)",
    "rounds": "rounds",
    "warmup_rounds": "warm-up rounds",
    "tokens_per_s": "tokens/s",
    "tflops": "model TFLOP/s",
    "intensity": "intensity (FLOP/byte)",
    "advantage": "time over ours (x)",
    "share_of_peak": "share of peak (%)",
    "peak_gib": "peak memory (GiB)",
    "speedup": "speed-up (x)",
    "d": "head dim d",
    "seq": "sequence length (tokens)",
    "context": "context length (tokens)",
    "size": "model size",
    "warmup": "warm-up rounds asked for",
    "megabytes": "message (MB)",
    "bucket_mb": "bucket (MiB)",
    "communication": "gradients travel in",
    "tier": "tier: longer of N_q and N_k (tokens)",
    "queries": "queries N_q (tokens)",
    "keys": "keys N_k (tokens)",
    "ratio": "queries to keys",
}
_NAMES = {
    "before_backward_bytes": "memory before backward",
    "saved_bytes": "saved for backward",
    "do_bench_ms": "do_bench (ms)",
    "bus_gb_per_s": "bus bandwidth (GB/s)",
    "algorithm_gb_per_s": "algorithm bandwidth (GB/s)",
    "wire_bytes": "sent by a rank",
    "exposed_ms": "added to a step (ms)",
    "unhidden_ms": "communication not hidden (ms)",
    "communication_ms": "communication (ms)",
    "gather_wait_ms": "waiting for gathers (ms)",
    "over_none": "time over none's (x)",
    "over_alone": "tokens/s over none's (x)",
    "epoch_s": "wall time per epoch (s)",
    "over_peer": "time over torch's (x)",
    "call_us": "all-reduce of no size (us)",
    "link_gb_per_s": "large all-reduce (GB/s)",
    "best_bucket_mb": "best bucket predicted (MiB)",
    "predicted_exposed_ms": "added, predicted (ms)",
    "predicted_communication_ms": "communication, predicted (ms)",
    "predicted_ms": "step, predicted (ms)",
    "speedup": "speed-up (x)",
    "predicted_held_bytes": "held after the step, predicted",
    "ratio": "ratio, ours to the other (x)",
}
_SHORT = {
    "d": "d",
    "seq": "seq",
    "context": "context",
    "size": "size",
    "warmup": "warm-up asked",
    "tier": "tier",
    "queries": "N_q",
    "keys": "N_k",
}
_UNITS = {
    "ms": "ms",
    "us": "us",
    "s": "s",
    "gib": "GiB",
    "mib": "MiB",
    "percent": "%",
    "mhz": "MHz",
}


def header(column: str, unit: str | None = None, *, axis: bool = False) -> str:
    """Return a column's heading with its unit; an axis may take more words."""
    if column in _SHORT and not axis:
        return _SHORT[column]
    if column in _HEADERS:
        return _HEADERS[column]
    group, _, rest = column.partition(".")
    name = rest if group in ("metrics", "counts", "facts", "case") else column
    if unit is not None:
        words = _NAMES.get(name, name.removesuffix("_bytes").replace("_", " "))
        return f"{words} ({unit})"
    if name in _NAMES:
        return _NAMES[name]
    if name.endswith("_per_s"):
        return f"{name.removesuffix('_per_s').replace('_', ' ')}/s"
    stem, _, last = name.rpartition("_")
    if stem and last in _UNITS:
        return f"{stem.replace('_', ' ')} ({_UNITS[last]})"
    return name.replace("_", " ")


def byte_unit(values: Iterable[float]) -> tuple[str, float]:
    """Return the unit that suits the largest of some sizes, and its bytes."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if largest >= 1024**power:
            return unit, float(1024**power)
    return "bytes", 1.0


def significant(value: float, digits: int = 4) -> str:
    """Return a number with `digits` significant digits and its thousands parted."""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 11:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def plain(value: float) -> str:
    """Return a tick label without exponent: 128, 1k, 0.05; powers of two keep k for 1024."""
    for size, letter in ((2**20, "M"), (2**10, "k"), (10**6, "M"), (10**3, "k")):
        if value >= size and value % size == 0:
            return f"{value // size:g}{letter}"
    return f"{value:g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.0e}"


def any_text(value: Any) -> str:
    """Return any cell as text: counts exact, other numbers with four significant digits."""
    if missing(value):
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else significant(value)
