"""The parent's side of one rank: its process, the pipe to it and the file for its stacks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

from cs336_systems.parallel.rank_nursery import fork_rank, start_python
from cs336_systems.parallel.rank_process import Failure

# multiprocessing's own spawn would run the parent's program again in each rank, pytest say, and
# start a tracker process for all of them.
_BOOT = """\
import json, sys
settings = json.loads(sys.argv[1])
sys.path[:] = settings.pop("path")
from cs336_systems.parallel.rank_process import serve
serve(**settings)
"""
# How long a rank may take for what needs no computing: to end, or to write its stacks.
_PATIENCE_S = 3.0


class RankHandle:
    """One rank, started at once; it ends when `kill` is called or when this process ends."""

    def __init__(self, number: int, folder: str, backend: str) -> None:
        self.number = number
        self._backend = backend
        self._stacks = Path(folder) / f"rank{number}.stacks"
        self.connection, theirs = Pipe()
        settings = {"folder": folder, "rank": number}
        with theirs:
            environment = _environment(backend)
            self._process = fork_rank(settings, environment, theirs) or start_python(
                _BOOT, {"fd": theirs.fileno(), **settings}, environment
            )

    def send(self, request: bytes) -> None:
        """Hand over a request; that the rank is dead is told by `receive`."""
        try:
            self.connection.send_bytes(request)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> tuple[Failure | None, bytes]:
        """Return the answer of a rank that has answered or died."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            pass
        return self._obituary(), b""

    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def ask_for_stacks(self) -> None:
        self._process.send_signal(signal.SIGUSR1)

    def stacks(self) -> str:
        return self._stacks.read_text(errors="replace") if self._stacks.exists() else ""

    def kill(self) -> None:
        if not self.is_dead():
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        self._process.wait()
        self.connection.close()

    def _obituary(self) -> Failure:
        died_s = time.monotonic()
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return Failure("closed the pipe to its parent", "", False, died_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the children that it may have left
        if code >= 0:
            return Failure(f"exited with code {code} without an answer", "", False, died_s)
        # NCCL's watchdog aborts a rank that waits too long for another one.
        is_echo = self._backend == "nccl" and -code == signal.SIGABRT
        summary = f"was killed by {signal.Signals(-code).name}"
        return Failure(summary, self.stacks(), is_echo, died_s)


def wait_for_any(ranks: Sequence[RankHandle], limit_s: float) -> list[RankHandle]:
    """Wait for a moment, `limit_s` at most, and return the ranks that have answered or died."""
    # A dead rank's pipe stays open while a child of its own holds it, so its end is looked for too.
    answered = wait([rank.connection for rank in ranks], min(limit_s, 0.1))
    return [rank for rank in ranks if rank.connection in answered or rank.is_dead()]


def stacks_of(ranks: Sequence[RankHandle]) -> dict[int, str]:
    """Have stuck ranks write down their stacks, which they can from native code too."""
    for rank in ranks:
        rank.ask_for_stacks()
    deadline = time.monotonic() + _PATIENCE_S
    before, stacks = None, {rank.number: "" for rank in ranks}
    while time.monotonic() < deadline and not (stacks == before and all(stacks.values())):
        time.sleep(0.1)
        before, stacks = stacks, {rank.number: rank.stacks() for rank in ranks}
    return {number: stack or "(it wrote none)" for number, stack in stacks.items()}


def _environment(backend: str) -> dict[str, str]:
    """Return the environment of a rank: the parent's, without what its pytest left there."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if backend == "gloo":
        names["OMP_NUM_THREADS"] = "1"
        if sys.platform == "linux":
            # All ranks are on this machine, whatever its host name resolves to.
            names.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return names
