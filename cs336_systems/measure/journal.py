"""A line per finished case beside the JSON that pytest-benchmark writes only at the very end.

An interrupted run leaves the journal; the report reads it like a JSON, and `--skip-done` continues
from it. A run that ends normally removes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cs336_systems.errors import UsageError, bad


class Journal:
    """Appends to `<json>.journal.jsonl`; the header is written with the first case."""

    def __init__(self, json_path: Path, header: Mapping[str, Any]) -> None:
        self.path = json_path.with_name(json_path.name + ".journal.jsonl")
        self.header = header
        self._started = False

    def append(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Add one finished case: `kind` is `benchmark` (timed) or `row` (not timed)."""
        with self.path.open("a" if self._started else "w") as file:
            if not self._started:
                file.write(json.dumps(self.header, default=str) + "\n")
                self._started = True
            file.write(json.dumps({kind: entry}, default=str) + "\n")

    def remove(self) -> None:
        """Delete the journal; what it held is in the JSON by now."""
        self.path.unlink(missing_ok=True)


def finished_cases(paths: Iterable[Path]) -> set[str]:
    """Return the full names of the cases that earlier JSON files or journals hold.

    Raises: UsageError for a file that is missing or neither of the two.
    """
    done: set[str] = set()
    for path in paths:
        try:
            text = path.read_text()
        except OSError as error:
            raise bad("benchmarks", "--skip-done", "name readable files", str(path)) from error
        done.update(_fullnames(path, text))
    return done


def _fullnames(path: Path, text: str) -> Iterable[str]:
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()[1:] if line.endswith("}")]
            return [entry["fullname"] for line in lines for entry in line.values()]
        data = json.loads(text)
        return [entry["fullname"] for entry in data["benchmarks"] + data["cs336_systems"]["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"benchmarks: --skip-done: {path} is not a result of this suite"
        ) from error
