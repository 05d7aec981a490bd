"""Where a file's numbers come from: the hardware, the versions, the commit and the command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cs336_systems.report.value import Value

_PROCESSES = {"processes", "ranks"}
"""What the parameters of a case that spans devices are called."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device that ran a case; cases on different hardware never share a table."""

    kind: str
    name: str
    count: int = 1
    cpu: str | None = None

    @property
    def label(self) -> str:
        """The device as titles name it."""
        name = self.name
        if self.kind == "cpu" and self.cpu and self.cpu != name:
            name = self.cpu if name.lower() == "cpu" else f"{name} ({self.cpu})"
        return f"{self.count} x {name}" if self.count > 1 else name

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")

    def identity(self) -> tuple[str, ...]:
        """Return what two files must share for their cases to be the same hardware's."""
        return (self.kind, self.label)


class Roof(NamedTuple):
    """What a device can reach at the most."""

    tflops: float
    terabytes_per_s: float

    @property
    def ridge(self) -> float:
        """The FLOPs a byte from which on the rate is what limits."""
        return self.tflops / self.terabytes_per_s

    def at(self, intensity: float) -> float:
        """Return the TFLOP/s within reach at so many FLOPs a byte.

        Source: Williams, Waterman and Patterson 2009, section 3.
        """
        return min(self.tflops, intensity * self.terabytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file's provenance."""

    path: Path
    hardware: Hardware
    versions: tuple[tuple[str, str], ...]
    """Name and version of what the numbers depend on, in the order that stamps list them."""
    power_limit_watts: float | None
    peak_flops: tuple[tuple[str, float], ...]
    peak_bytes_per_s: float | None
    commit: str
    command: str | None

    def version(self, name: str) -> str | None:
        """Return the version of one dependency, None where the file does not say."""
        return dict(self.versions).get(name)

    def hardware_of(self, kind: str, case: Mapping[str, Any]) -> Hardware:
        """Return the hardware of a case measured on `kind`: a GPU machine has host cases too.

        A case that names no processes runs on one device, however many the machine has.
        """
        if kind == self.hardware.kind:
            return self.hardware if _PROCESSES & case.keys() else replace(self.hardware, count=1)
        return Hardware(kind=kind, name=self.hardware.cpu or kind, cpu=self.hardware.cpu)

    def peak(self, kind: str, dtype: str | None) -> float | None:
        """Return the device's peak rate in FLOP/s for a dtype, None where it is unknown."""
        known = dict(self.peak_flops) if kind == self.hardware.kind else {}
        return known.get(dtype or "")

    def roof(self, kind: str, dtype: str | None) -> Roof | None:
        """Return the device's limits for a dtype, None where one of them is unknown."""
        rate, bandwidth = self.peak(kind, dtype), self.peak_bytes_per_s
        return None if rate is None or bandwidth is None else Roof(rate / 1e12, bandwidth / 1e12)


def read_source(path: Path, head: Value) -> Source:
    """Return the provenance that a file's head gives."""
    machine = head["machine_info"]
    device, cpu = machine["device"], machine["cpu"]
    brand = None if cpu.absent else cpu["brand_raw"].text_or_none()
    hardware = Hardware(
        kind=device["kind"].text(),
        name=device["name"].text(),
        count=1 if device["count"].absent else device["count"].integer(),
        cpu=brand,
    )
    peaks = [(dtype, rate.number_or_none()) for dtype, rate in device["peak_flops"].fields()]
    run = head["cs336_systems"]["run"]
    return Source(
        path=path,
        hardware=hardware,
        versions=_versions(machine),
        power_limit_watts=device["power_limit_w"].number_or_none(),
        peak_flops=tuple((dtype, rate) for dtype, rate in peaks if rate is not None),
        peak_bytes_per_s=device["peak_bytes_per_s"].number_or_none(),
        commit=_commit(head["commit_info"]),
        command=None if run.absent else run["command"].text_or_none(),
    )


def _versions(machine: Value) -> tuple[tuple[str, str], ...]:
    device = machine["device"]
    found = [(name, device[name]) for name in ("driver", "cuda", "torch", "triton")]
    python = device["python"] if not device["python"].absent else machine["python_version"]
    return tuple(
        (name, value.text()) for name, value in [*found, ("python", python)] if not value.absent
    )


def _commit(commit: Value) -> str:
    if commit.absent or commit["id"].absent:
        return "unknown"
    name = commit["id"].text()
    short = name[:8] if re.fullmatch(r"[0-9a-f]{9,}", name) else name
    return f"{short}+dirty" if commit["dirty"].raw is True else short


def stamp(sources: Iterable[Source], hardware: Hardware, *, brief: bool = False) -> list[str]:
    """Return what every table and plot carries: hardware, versions, commit, commands.

    Sources that differ only in their commands share a line; `brief` shows two and counts the rest.
    """
    commands: dict[str, list[str]] = {}
    for source in sources:
        listed = commands.setdefault(_stamp_line(source, hardware), [])
        if source.command and source.command not in listed:
            listed.append(source.command)
    return [f"{line}{_made_by(listed, brief)}" for line, listed in commands.items()]


def _made_by(commands: Sequence[str], brief: bool) -> str:
    if not commands:
        return ""
    shown = commands[:2] if brief and len(commands) > 3 else commands
    rest = (
        f" and {len(commands) - len(shown)} more, listed in the table" if shown != commands else ""
    )
    return "; made by " + ", ".join(f"`{command}`" for command in shown) + rest


def _stamp_line(source: Source, hardware: Hardware) -> str:
    names = {"cuda": "CUDA"}
    parts = [hardware.label]
    if source.power_limit_watts is not None and hardware.kind == source.hardware.kind:
        parts.append(f"power limit {source.power_limit_watts:g} W")
    # A driver and a CUDA version say nothing about a case that ran on the host.
    hidden = ("driver", "cuda") if hardware.kind == "cpu" else ()
    parts += [
        f"{names.get(name, name)} {text}" for name, text in source.versions if name not in hidden
    ]
    parts.append(f"commit {source.commit}")
    return "; ".join(parts)
