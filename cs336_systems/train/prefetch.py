"""Work that is done ahead on a thread, so that training never waits for its data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# How long the thread sleeps at most before it sees that nobody wants more.
_WAKE_S = 0.05


class Prefetcher:
    """Calls `make(step)` for each step in order, at most `depth` ahead, and moves what it gives.

    On a GPU the tensors wait in pinned memory, from where their copies run beside the host's work.
    An error of the thread is raised where its tensor was wanted. Leaving the context ends it.
    """

    def __init__(
        self,
        make: Callable[[int], Tensor],
        steps: Iterable[int],
        device: torch.device,
        *,
        depth: int = 4,
    ) -> None:
        self._make, self._steps, self._device = make, steps, device
        self._ready: queue.Queue[Tensor | BaseException | None] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def next(self) -> Tensor:
        """Return the next step's tensor, on the device or on its way to it.

        Raises: what `make` raised; StopIteration after the last step.
        """
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again
            raise StopIteration if item is None else item
        return item.to(self._device, non_blocking=True)

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread's own, or else it pins for GPU 0
            for step in self._steps:
                tensor = self._make(step)
                if not self._put(tensor.pin_memory() if self._device.type == "cuda" else tensor):
                    return
        except BaseException as error:
            end = error
        self._put(end)

    def _put(self, item: Tensor | BaseException | None) -> bool:
        while not self._ended.is_set():
            try:
                self._ready.put(item, timeout=_WAKE_S)
            except queue.Full:
                continue
            return True
        return False
