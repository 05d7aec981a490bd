"""A comparison in words: a compact table, one summary line, and JSON for a script."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from tabulate import tabulate

from cs336_systems.report.compare import Comparison, Outcome
from cs336_systems.report.text import NOTHING, significant

_MOST_UNCHANGED = 15
_KINDS = {
    "regression": ("regression", "regressions"),
    "appeared": ("appeared", "appeared"),
    "disappeared": ("disappeared", "disappeared"),
    "status": ("status change", "status changes"),
    "counts": ("count change", "count changes"),
    "clock": ("clock change", "clock changes"),
}


def table(comparison: Comparison) -> str:
    """Return the comparison's table, worst first; of the cases within limits only the slowest."""
    changed = [outcome for outcome in comparison.outcomes if outcome.failures]
    same = [outcome for outcome in comparison.outcomes if not outcome.failures]
    shown = [*changed, *same[:_MOST_UNCHANGED]]
    metric = comparison.rules.metric
    text = tabulate(
        [_line(outcome, comparison.rules.min_ms) for outcome in shown],
        headers=["case", f"base {metric} (ms)", f"head {metric} (ms)", "change", "verdict"],
        colalign=["left", "right", "right", "right", "left"],
        disable_numparse=True,
        tablefmt="simple",
    )
    left_out = len(same) - _MOST_UNCHANGED
    return text + (f"\n... and {left_out} more within limits" if left_out > 0 else "")


def _line(outcome: Outcome, min_ms: float) -> list[str]:
    times = [outcome.base_ms, outcome.head_ms]
    change = outcome.change_percent
    return [
        outcome.case,
        *(NOTHING if time is None else significant(time) for time in times),
        NOTHING if change is None else f"{change:+.1f} %",
        _verdict(outcome, min_ms),
    ]


def _verdict(outcome: Outcome, min_ms: float) -> str:
    if outcome.failures:
        found = "; ".join(f"{failure.kind}: {failure.detail}" for failure in outcome.failures)
        return f"declared ({outcome.declared}): {found}" if outcome.declared else found
    if outcome.base_ms is None or outcome.head_ms is None:
        return "same, no time"
    return "within limits" if outcome.gated else f"not gated: below {min_ms:g} ms"


def summary(comparison: Comparison) -> str:
    """Return the comparison in one line."""
    found: Counter[str] = Counter(
        failure.kind
        for outcome in comparison.outcomes
        if outcome.failed
        for failure in outcome.failures
    )
    declared = sum(outcome.declared is not None for outcome in comparison.outcomes)
    num_cases = len(comparison.outcomes)
    parts = [f"{num_cases} case{'' if num_cases == 1 else 's'}"]
    for kind, (one, many) in _KINDS.items():
        if found[kind] or kind == "regression":
            parts.append(f"{found[kind]} {one if found[kind] == 1 else many}")
    return f"compare: {', '.join(parts)}, {declared} declared"


def as_json(comparison: Comparison) -> str:
    """Return the comparison as JSON: the flagged cases, their pytest names and every outcome."""
    outcomes = [
        {**asdict(outcome), "change_percent": outcome.change_percent, "failed": outcome.failed}
        for outcome in comparison.outcomes
    ]
    data = {
        "passed": comparison.passed,
        "summary": summary(comparison),
        "flagged": comparison.flagged,
        "fullnames": comparison.fullnames,
        "outcomes": outcomes,
    }
    return json.dumps(data, indent=1) + "\n"
