"""Training ranks as processes of this program, which passes signals on and waits for them.

torchrun ends ranks thirty seconds after a signal, saved or not, and then fails itself; here a rank
that is told to stop has the time that saving takes, and ending well is success.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_HOST = "127.0.0.1"
_POLL_S = 0.05
_SHOWN_BYTES = 4000
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    rank: int
    # Exit status; a signal's number, negative, where one ended it.
    status: int
    # The end of what it printed; rank 0 prints to the caller's terminal instead.
    printed: str


@dataclass(frozen=True)
class Launched:
    """How a launch ended."""

    ranks: list[Ended]
    # The first signal that was passed on to the ranks.
    stopped_by: signal.Signals | None


def launch(command: Sequence[str], num_ranks: int, *, grace_s: float = 10.0) -> Launched:
    """Run `command` on each of `num_ranks` ranks that find each other as under torchrun.

    SIGTERM and SIGINT go to every rank. When one fails, the others have `grace_s` to notice and to
    say what they saw.
    """
    # Served from here on a port that the system chose, so that no port can be taken already.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    with contextlib.ExitStack() as stack:
        outputs = [None, *(stack.enter_context(_scratch()) for _ in range(1, num_ranks))]
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_kill, processes)
        signals = stack.enter_context(_passed_on(processes))
        for rank, output in enumerate(outputs):
            if signals:
                break
            environment = {**os.environ, **_variables(rank, num_ranks, store.port)}
            # In a session of its own, a rank hears of a Ctrl-C only once, from here.
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            processes.append(process)
        _wait(processes, grace_s)
        ended = [
            Ended(rank, process.returncode, _end_of(output))
            for rank, (process, output) in enumerate(zip(processes, outputs, strict=False))
        ]
        return Launched(ended, signals[0] if signals else None)


def _variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        # The store is there already: rank 0 must not serve one too.
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        # What this program has found, it has perhaps put on its path itself.
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


@contextlib.contextmanager
def _passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[signal.Signals]]:
    """Send each signal on to all ranks; give those that came, in order."""
    came: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]], grace_s: float) -> None:
    deadline = float("inf")
    while None in (statuses := [process.poll() for process in processes]):
        if deadline == float("inf") and any(statuses):
            deadline = time.monotonic() + grace_s
        if time.monotonic() > deadline:
            _kill(processes)
        time.sleep(_POLL_S)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _scratch() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


def _end_of(output: IO[bytes] | None) -> str:
    if output is None:
        return ""
    output.seek(max(0, output.seek(0, os.SEEK_END) - _SHOWN_BYTES))
    return output.read().decode(errors="replace").strip()
