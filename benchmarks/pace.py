"""Cases that cannot be timed, found by running one once: a peer raises, or a sweep would crawl."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from cs336_systems.attention import ATTENTION
from cs336_systems.measure.memory import is_out_of_memory
from cs336_systems.measure.workload import NotMeasured, Workload

_LONGEST_REASON = 160


def run_once(attention: str, workload: Workload) -> None:
    """Run a workload once; what a peer raises for its inputs ends the case as a row.

    Raises: NotMeasured with the peer's words; our own rows' errors as they are.
    """
    try:
        if workload.setup is not None:
            workload.setup()
        workload.step()
    except Exception as error:
        if not ATTENTION[attention].peer or is_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:_LONGEST_REASON]
        reason = f"{attention}: raised {type(error).__name__}: {said}"
        raise NotMeasured("skipped", reason) from None


@dataclass
class _Seen:
    """The longest sequence that a sweep has run one row at."""

    seq: int
    first_seconds: float
    """Of the first call, with its compilation."""
    seconds: float


class Pace:
    """Ends a sweep over lengthening sequences where it would take minutes, and keeps compiled code
    between the passes of one shape."""

    def __init__(self, call_seconds: float = 0.5, first_seconds: float = 30.0) -> None:
        self._call_seconds = call_seconds
        self._first_seconds = first_seconds
        self._seen: dict[Hashable, _Seen] = {}
        self._compiled_for: Hashable = None

    def begin(self, shape: Hashable) -> None:
        """Drop what was compiled for another shape: each is compiled for itself alone."""
        if shape != self._compiled_for:
            torch.compiler.reset()
        self._compiled_for = shape

    def refuse_slow(self, key: Hashable, seq: int) -> None:
        """Raise NotMeasured when the last length of this row says that `seq` takes too long."""
        last = self._seen.get(key)
        if last is None:
            return
        if last.first_seconds > self._first_seconds:
            reason = f"the first call took {last.first_seconds:.0f} s at {last.seq} tokens already"
            raise NotMeasured("skipped", f"{reason}; the sweep allows {self._first_seconds:g} s")
        predicted = last.seconds * (seq / last.seq) ** 2
        if predicted > self._call_seconds:
            reason = f"predicted {predicted:.1f} s a call from {last.seconds:.2g} s"
            limit = f"the sweep allows {self._call_seconds:g} s"
            raise NotMeasured("skipped", f"{reason} at {last.seq} tokens; {limit}")

    def measure(
        self, key: Hashable, seq: int, run: Callable[[], None], wait: Callable[[], None]
    ) -> None:
        """Time a first and a second call of `run`, for the next length to be judged by."""
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
        self._seen[key] = _Seen(seq, *seconds)
