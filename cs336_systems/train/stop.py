"""Being asked to stop: SIGTERM, as a cluster sends before it takes a machine back, and SIGINT.

One rank's signal stops all of them at the same step. The flag travels through the host's memory,
beside the step: an exchange is begun at one boundary and looked at in the next.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Catches the signals inside its context; a second SIGINT interrupts as ever."""

    def __init__(self) -> None:
        self.was_asked = False
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python lets no other thread than the main one catch signals.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if error is None and self._group is not None:
            if self._exchange is not None:
                self._exchange.wait()
            dist.destroy_process_group(self._group)

    def is_agreed(self) -> bool:
        """Tell whether all ranks stop here; called on all of them, at the end of every step."""
        if self._group is None:
            return self.was_asked
        if self._exchange is not None:
            self._exchange.wait()
            if self._flag.item():
                return True
        self._flag = torch.tensor([self.was_asked], dtype=torch.int32)
        self._exchange = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
