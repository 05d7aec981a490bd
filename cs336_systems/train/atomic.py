"""Files of training data, replaced whole; what the disk refuses is one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cs336_systems import durable
from cs336_systems.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place when the block ends, and vanishes if it fails.

    Raises: UsageError when the disk refuses, with the system's reason.
    """
    try:
        with durable.replacing(path) as file:
            yield file
    except OSError as error:
        raise refused(path, error) from error


def refused(path: Path, error: OSError) -> UsageError:
    """Build the one line for a file that cannot be written."""
    return UsageError(f"train: {path} cannot be written: {error.strerror or error}")
