"""Benchmark JSON made by hand for the report's tests: every study, every outcome, no clock."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

SCHEMA = "cs336-systems/1"
SIZES = {"small": 1.0, "medium": 3.2, "large": 7.5, "xl": 15.0, "2.7b": 27.0}
CONTEXTS = (128, 256, 512, 1024)
PASSES = {"forward": 1.0, "forward_backward": 3.1, "full_step": 3.6}
VARIANTS = {
    ("fp32", "eager"): 1.0,
    ("fp32", "blocks"): 0.82,
    ("fp32", "model"): 0.78,
    ("bf16", "eager"): 0.36,
    ("bf16", "blocks"): 0.22,
    ("bf16", "model"): 0.2,
}
GPU = {
    "kind": "cuda",
    "name": "NVIDIA H200",
    "count": 1,
    "driver": "580.159.04",
    "cuda": "13.0",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "python": "3.12.3",
    "power_limit_w": 700.0,
    "peak_flops": {"fp32": 6.7e13, "tf32": 4.94e14, "fp16": 9.89e14, "bf16": 9.89e14},
    "peak_bytes_per_s": 4.8e12,
}
CPU = {
    "kind": "cpu",
    "name": "Example CPU 9000",
    "count": 1,
    "torch": "2.11.0+cpu",
    "triton": "3.6.0",
    "cuda": None,
    "python": "3.11.9",
    "peak_flops": None,
}


def record(study: str, case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a record as it travels in JSON."""
    return {
        "schema": SCHEMA,
        "study": study,
        "case": case,
        "status": "ok",
        "reason": None,
        "clock": "wall_ms",
        "cache": "warm",
        "rounds": None,
        "warmup_rounds": 5,
        "calls_per_round": 1,
        "tokens": None,
        "flops": None,
        "flops_dtype": None,
        "least_bytes": None,
        "baseline": None,
        "device": "cuda",
        "metrics": {},
        "counts": {},
        "facts": {},
        "conditions": {},
        **changes,
    }


def stats(median: float, *, spread: float = 0.01, rounds: int = 10) -> dict[str, Any]:
    """Return statistics in seconds of rounds that wave around a median."""
    data = [median * (1 + spread * math.sin(index + 0.5)) for index in range(rounds)]
    ordered = sorted(data)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": sum(data) / rounds,
        "stddev": median * spread * 0.7,
        "median": median,
        "q1": ordered[rounds // 4],
        "q3": ordered[(3 * rounds) // 4],
        "iqr": ordered[(3 * rounds) // 4] - ordered[rounds // 4],
        "rounds": rounds,
        "iterations": 1,
        "data": data,
    }


def fullname(study: str, case: dict[str, Any]) -> str:
    """Return the pytest name of a case."""
    return f"benchmarks/bench_{study}.py::bench[{'-'.join(map(str, case.values()))}]"


def timed(study: str, case: dict[str, Any], median: float, **changes: Any) -> dict[str, Any]:
    """Return an entry of `benchmarks`."""
    spread = changes.pop("spread", 0.01)
    return {
        "group": study,
        "name": fullname(study, case).partition("::")[2],
        "fullname": fullname(study, case),
        "params": {},
        "extra_info": record(study, case, **changes),
        "stats": stats(median, spread=spread),
    }


def untimed(study: str, case: dict[str, Any], status: str, **changes: Any) -> dict[str, Any]:
    """Return an entry of `cs336_systems.rows`."""
    row = record(study, case, status=status, **changes)
    return {**row, "fullname": fullname(study, case)}


def document(*entries: dict[str, Any], device: dict[str, Any] = GPU, **run: Any) -> dict[str, Any]:
    """Return a whole file of some entries, timed and not."""
    head = {
        "machine_info": {
            "python_version": device["python"],
            "cpu": {"brand_raw": "Example CPU 9000"},
            "device": dict(device),
        },
        "commit_info": {"id": "0123abcd" * 5, "dirty": False},
        "datetime": "2026-11-21T05:10:00+00:00",
        "cs336_systems": {
            "schema": SCHEMA,
            "run": {"command": "pytest benchmarks/ --sizes small,2.7b", "seconds": 3.5, **run},
            "rows": [copy.deepcopy(entry) for entry in entries if "extra_info" not in entry],
        },
        "benchmarks": [copy.deepcopy(entry) for entry in entries if "extra_info" in entry],
    }
    for entry in head["benchmarks"]:
        entry["extra_info"]["device"] = device["kind"]
    return head


def write(path: Path, data: Any) -> Path:
    """Write JSON and return its path."""
    path.write_text(json.dumps(data))
    return path


def write_journal(path: Path, data: dict[str, Any], tail: str = "") -> Path:
    """Write what an interrupted run leaves of a document, `tail` being its last broken line."""
    head = {name: value for name, value in data.items() if name != "benchmarks"}
    rows = head["cs336_systems"]["rows"]
    lines = [{**head, "cs336_systems": {**head["cs336_systems"], "rows": []}}]
    lines += [{"benchmark": entry} for entry in data["benchmarks"]]
    lines += [{"row": entry} for entry in rows]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n" + tail)
    return path


def model_pass(size: str, context: int, variant: tuple[str, str], which: str) -> dict[str, Any]:
    """Return a case of the model study, out of memory where 139 GiB would not do."""
    case = {
        "size": size,
        "context": context,
        "precision": variant[0],
        "compile": variant[1],
        "pass": which,
    }
    flops = 2.6e11 * SIZES[size] * (context / 256) * PASSES[which]
    peak = 2**30 * SIZES[size] * (1 + context / 256) * (1.6 if variant[0] == "fp32" else 1.0)
    peak *= 0.4 if which == "forward" else 1.0
    common = {
        "tokens": 4 * context,
        "flops": flops,
        "flops_dtype": variant[0],
        "baseline": {"precision": "fp32", "compile": "eager"},
    }
    if peak > 139 * 2**30:
        reason = f"asked for {peak / 2**36:.0f}.5 GiB with 3.1 GiB free"
        return untimed("model_pass", case, "oom", reason=reason, **common)
    median = flops / 3.5e13 * VARIANTS[variant]
    counts = {"operators": int(100 * SIZES[size]), "saved_bytes": int(peak / 3)}
    metrics = {"peak_bytes": peak}
    conditions = {"throttle": ["none", "SwPowerCap" if size == "2.7b" else "none"]}
    more = {"metrics": metrics, "counts": counts, "conditions": conditions}
    return timed("model_pass", case, median, **common, **more)


def model_grid() -> list[dict[str, Any]]:
    """Return every case of the model study: 360 of them."""
    return [
        model_pass(size, context, variant, which)
        for size in SIZES
        for context in CONTEXTS
        for variant in VARIANTS
        for which in PASSES
    ]


def warmups() -> list[dict[str, Any]]:
    """Return the warm-up study: without warm-up the first round is by far the slowest."""
    entries = []
    for size in ("small", "medium"):
        for asked in (0, 1, 2, 5):
            case = {"size": size, "context": 256, "precision": "fp32", "compile": "eager"}
            case |= {"pass": "full_step", "warmup": asked}
            entry = timed("warmup", case, 0.02 * SIZES[size], warmup_rounds=asked, spread=0.03)
            if asked == 0:
                entry["stats"]["data"][0] *= 12
                entry["stats"]["mean"] *= 2.1
                entry["stats"]["stddev"] = entry["stats"]["mean"] * 1.6
            entries.append(entry)
    return entries


def attention_grid() -> list[dict[str, Any]]:
    """Return the attention study, in which the plain attention runs out of memory."""
    names = {"vectorized": 1.0, "compiled": 0.7, "flash_torch": 2.4, "flash_triton": 0.15}
    entries = []
    for name, cost in names.items():
        for dim in (16, 32, 64, 128):
            for seq in (256, 1024, 4096, 8192, 16384):
                for which in ("forward", "backward"):
                    case = {"attention": name, "d": dim, "seq": seq, "dtype": "bf16", "pass": which}
                    plain = name in ("vectorized", "compiled")
                    if plain and seq == 16384:
                        reason = "asked for 16.0 GiB with 3.1 GiB free"
                        entries.append(untimed("attention_grid", case, "oom", reason=reason))
                        continue
                    held = 8 * seq * (seq * 4 if plain else dim * 6) + 2**20
                    seconds = (2e-5 + cost * seq * seq * dim * 4e-13) * (
                        2.4 if which[0] == "b" else 1
                    )
                    metrics = {"before_backward_bytes": held, "saved_bytes": held // 2}
                    more = {"clock": "gpu_ms", "cache": "cold", "metrics": metrics}
                    entries.append(timed("attention_grid", case, seconds, **more))
    case = {"attention": "flash_attn_4", "d": 64, "seq": 1024, "dtype": "bf16", "pass": "forward"}
    reason = "needs the package flash-attn-4"
    entries.append(untimed("attention_grid", case, "not_installed", reason=reason))
    return entries


def findings() -> list[dict[str, Any]]:
    """Return the studies that are tables only, and one that no specification knows."""
    entries = []
    for variant, error in (("fp32 + fp32", 2.1e-4), ("fp16 + fp16", 4.7e-2), ("fp32 + fp16", 2e-3)):
        metrics = {"result": 10 + error, "error": error}
        entries.append(timed("accumulation", {"variant": variant}, 2e-3, metrics=metrics))
    for dtype in ("fp16", "bf16"):
        facts = {
            "params": "float32",
            "fc1": dtype,
            "ln": "float32",
            "logits": dtype,
            "loss": "float32",
        }
        entries.append(untimed("autocast_dtypes", {"dtype": dtype}, "ok", facts=facts))
    for check in ("self_check", "cross_check"):
        metrics = {"do_bench_ms": 1.02, "ratio": 0.98}
        entries.append(timed(check, {"work": "matmul", "clock": "gpu_ms"}, 1e-3, metrics=metrics))
    for ranks in (1, 2, 4):
        case = {"ranks": ranks, "strategy": "flat"}
        entries.append(timed("unlisted", case, 4e-3 / ranks))
        entries.append(timed("unlisted", {**case, "strategy": "naive"}, 6e-3 / ranks))
    entries.append(
        untimed("unlisted", {"ranks": 8, "strategy": "flat"}, "skipped", reason="4 GPUs")
    )
    return entries


def everything() -> dict[str, Any]:
    """Return a file with more than five hundred cases."""
    return document(*model_grid(), *warmups(), *attention_grid(), *findings())
