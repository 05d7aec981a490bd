"""Files that are either the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cs336_systems.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place when the block ends, and vanishes if it fails.

    Raises: UsageError when the disk refuses, with the system's reason.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        commit(part, path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def commit(part: Path, path: Path) -> None:
    """Rename the finished `part` to `path`, and make the rename itself survive a power cut."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def refused(path: Path, error: OSError) -> UsageError:
    """Build the one line for a file that cannot be written."""
    return UsageError(f"train: {path} cannot be written: {error.strerror or error}")
