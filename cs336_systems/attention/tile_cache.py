"""The file in which measured tiles outlive a process; several may write it at once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cs336_systems.durable import replacing

SCHEMA = 1
"""Of the file; entries of another are not read."""


class UnreadableError(Exception):
    """The file is there and cannot be understood."""


def cache_path() -> Path:
    """Return the file of measured tiles."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "cs336_systems", "tiles.json")


def read(path: Path) -> dict[str, Any]:
    """Return the entries; none if there is no file, or it is of another schema.

    Raises: UnreadableError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["tiles"]) if content["schema"] == SCHEMA else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UnreadableError(repr(error)) from error


def merge(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Add entries to those in the file by now; return them all.

    Raises: OSError when the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        found: dict[str, Any] = {}
        with suppress(UnreadableError):  # Its reader has warned; it is written anew.
            found = read(path)
        merged = {**found, **entries}
        content = {"schema": SCHEMA, "tiles": merged}
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1, sort_keys=True).encode())
    return merged


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing between this one's reading and writing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
