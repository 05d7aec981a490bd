"""Work that is done again only when what it depends on, or what it made, has changed.

A stage's record lies beside its outputs: the inputs that it was run with, and size, time and sha256
of each file. It is written last, so that a stage which was cut short is run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs336_systems.train.atomic import replacing
from cs336_systems.train.download import file_sha256

# Values up to this length are shown when they change; of longer ones, hashes mostly, the name.
_SHOWN_CHARS = 48


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step from inputs to files."""

    name: str
    # Where its record is kept.
    folder: Path
    # JSON values by the names that users know; equal ones mean equal outputs.
    inputs: Mapping[str, Any]
    outputs: tuple[Path, ...]

    @property
    def record_path(self) -> Path:
        """Where the last complete run is described."""
        return self.folder / f"{self.name}.stage.json"

    def run(self, work: Callable[[], None], say: Callable[[str], None]) -> bool:
        """Do `work` unless its outputs are up to date, saying why; return whether it was done.

        Raises: whatever `work` raises, and UsageError when the record cannot be written.
        """
        reason = self.reason_to_run()
        if reason is None:
            say(f"{self.name}: up to date ({', '.join(self.inputs)} unchanged)")
            return False
        say(f"{self.name}: runs, {reason}")
        begin = time.monotonic()
        work()
        self.record()
        say(f"{self.name}: done in {time.monotonic() - begin:.1f} s")
        return True

    def reason_to_run(self) -> str | None:
        """Return what has changed since the last complete run, or None if nothing has."""
        try:
            then = json.loads(self.record_path.read_bytes())
            inputs, outputs = dict(then["inputs"]), dict(then["outputs"])
        except FileNotFoundError:
            return "not done yet"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.record_path.name} is damaged"
        # As they come back from JSON.
        now = json.loads(json.dumps(dict(self.inputs)))
        changes = [
            _change(name, inputs.get(name), now.get(name))
            for name in dict.fromkeys([*now, *inputs])
            if inputs.get(name) != now.get(name)
        ]
        if changes:
            return ", ".join(changes)
        faults = (_fault(path, outputs.get(path.name)) for path in self.outputs)
        return next((fault for fault in faults if fault), None)

    def record(self) -> None:
        """Describe inputs and outputs as those of a complete run."""
        described = {
            "inputs": dict(self.inputs),
            "outputs": {path.name: _identity(path) for path in self.outputs},
        }
        with replacing(self.record_path) as file:
            file.write(json.dumps(described, indent=2).encode() + b"\n")


def file_facts(path: Path) -> list[Any]:
    """Return what tells a file from an edited one without reading it: path, size, time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "num_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": file_sha256(path),
    }


def _fault(path: Path, then: Any) -> str | None:
    """Return what is wrong with an output; only one that was touched is read to find out."""
    if not path.exists():
        return f"{path.name} is missing"
    stat = path.stat()
    match then:
        case {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
            return None
        case {"num_bytes": stat.st_size, "sha256": sha256} if file_sha256(path) == sha256:
            return None
    return f"{path.name} is not as it was written"


def _change(name: str, then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        names = [key for key in dict.fromkeys([*now, *then]) if then.get(key) != now.get(key)]
        return ", ".join(_change(f"{name}.{key}", then.get(key), now.get(key)) for key in names)
    shown = [json.dumps(value) for value in (then, now)]
    if max(map(len, shown)) > _SHOWN_CHARS:
        return f"{name} changed"
    return f"{name} changed from {shown[0]} to {shown[1]}"
