"""log.jsonl: one line for each logged step, once, however often the run was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cs336_systems.errors import UsageError
from cs336_systems.train.atomic import refused, replacing


class RunLog:
    """Appends lines that are on their way to the disk as soon as they are written.

    Lines past `last_step`, which a resumed run will write again, are dropped when it is opened, and
    so is half a line that a killed run has left.
    Raises: UsageError when the disk refuses.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= last_step]
        with replacing(path) as file:
            file.writelines(_encoded(line) for line in kept)
        self._file = path.open("ab")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        try:
            self._file.write(_encoded(line))
            self._file.flush()
        except OSError as error:
            raise refused(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log in order, without a last one that is not whole.

    Raises: UsageError for a damaged log.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # what follows the last line's end is none, or half of one
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UsageError(f"train: {path} is damaged: {error}") from error


def _encoded(line: dict[str, Any]) -> bytes:
    # JSON has neither NaN nor infinity.
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    return json.dumps(plain).encode() + b"\n"
