"""The folder of a run: written by one run at a time, which tidies up after one that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from cs336_systems.errors import UsageError, bad

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(BaseException):
    """A signal said to stop; like KeyboardInterrupt, not for `except Exception`."""

    def __init__(self, number: int) -> None:
        self.number = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; the same command goes on where this one was")


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise SIGTERM and SIGINT as StoppedError, so that files half-written are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder, and remove what a killed run has left half-written in it.

    Raises: UsageError when another run holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The system lets go of it however the process ends.
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UsageError(f"pipeline: {folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            rule = "be a folder that no other run is writing"
            raise bad("pipeline", "output_dir", rule, str(folder)) from error
        for part in [*folder.glob("*.part"), *folder.glob("data/*.part")]:
            part.unlink(missing_ok=True)
        yield
