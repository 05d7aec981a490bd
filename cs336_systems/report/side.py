"""One side of a comparison: every case with its rows from all the files of base, or of head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cs336_systems.report.frame import Frame, Row, case_key
from cs336_systems.report.source import Source


@dataclass(frozen=True)
class Repeats:
    """One case in all files of one side."""

    rows: Sequence[Row]

    def times(self, metric: str) -> list[float]:
        """Return the time in each file that has one."""
        return [row[f"{metric}_ms"] for row in self.rows if row[f"{metric}_ms"] is not None]

    @property
    def status(self) -> str:
        """How the case ended in the best of the files."""
        if any(row["median_ms"] is not None for row in self.rows):
            return "timed"
        found = {row["status"] for row in self.rows}
        return "ok" if "ok" in found else min(found)

    def clocks(self) -> str:
        """Return on which clock and with which cache the case was timed."""
        return " or ".join(sorted({f"{row['clock']}, {row['cache']} cache" for row in self.rows}))

    def counts(self) -> dict[str, set[int]]:
        """Return every value that each count took over the files."""
        found: dict[str, set[int]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith("counts.") and value is not None:
                    found.setdefault(name.removeprefix("counts."), set()).add(value)
        return found


def by_case(frames: Iterable[Frame]) -> dict[tuple[Any, ...], Repeats]:
    """Return the cases of some files; a case on the host of a GPU is not the GPU's."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for frame in frames for row in frame.rows()):
        key = (row["device_kind"], case_key(row["study"], row["case"]))
        found.setdefault(key, []).append(row)
    return {key: Repeats(rows) for key, rows in found.items()}


def unlike(base: Sequence[Frame], head: Sequence[Frame]) -> list[str]:
    """Return every difference for which times of base and head must not be compared."""
    frames = [("base", frame) for frame in base] + [("head", frame) for frame in head]
    on_cpu = any("cpu" in set(frame.cases["device_kind"]) for _, frame in frames)
    first = _environment(base[0].sources[0], on_cpu)
    found: dict[str, None] = {}
    for side, frame in frames:
        for source in frame.sources:
            for name, value in _environment(source, on_cpu).items():
                if value != first[name]:
                    found[f"{name}: base {first[name]}, {side} {value}"] = None
    return list(found)


def _environment(source: Source, on_cpu: bool) -> dict[str, str]:
    hardware = source.hardware
    python = (source.version("python") or "unknown").split(".")
    facts = {
        "device": hardware.name,
        "kind": hardware.kind,
        **{name: source.version(name) or "none" for name in ("torch", "triton", "cuda")},
        "python": ".".join(python[:2]),
    }
    return facts | ({"cpu": hardware.cpu or "unknown"} if on_cpu else {})
