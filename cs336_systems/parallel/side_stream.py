"""Collectives beside the computation, and the order between the two.

On a GPU they run on a stream of high priority, with events in place of waits of the host. On the
CPU they run on the backend's own threads, and what follows them runs when somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist


def _nothing() -> None:
    return


class Ticket:
    """Work on its way. What it was made of, and thus every tensor it uses, lives until it has been
    waited for."""

    def __init__(self, wait: Callable[[], None], *held: object) -> None:
        self._wait = wait
        self._held = held
        self._is_over = False

    def wait(self) -> None:
        """Let what the caller computes from here on come after the work."""
        if not self._is_over:
            self._is_over = True
            self._wait()
            self._wait, self._held = _nothing, ()


class _Entered:
    """Makes `stream` current, behind what is queued by then. What torch.cuda.stream does with a
    third of its work, which a backward pass with hundreds of buckets feels."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._device_before = torch.cuda.current_device()
        self._stream_before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._stream_before)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *_exception: object) -> None:
        torch.cuda.set_stream(self._stream_before)
        if torch.cuda.current_device() != self._device_before:
            torch.cuda.set_device(self._device_before)


class SideStream:
    """Where collectives run while the current stream computes.

    Tensors it touches are allocated by the caller, on the stream that computes, and freed after
    the ticket was waited for, or after `join`. The allocator thus reuses them in that stream's
    order, and memory is the same in every step, which `record_stream` would not give.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @property
    def is_beside(self) -> bool:
        """Whether there is a stream, so that collectives need no handles to run beside others."""
        return self._stream is not None

    def entered(self) -> AbstractContextManager[None]:
        """Queue what the block launches behind all that is queued so far."""
        return nullcontext() if self._stream is None else _Entered(self._stream)

    def join(self) -> None:
        """Let what the caller computes from here on come after all that was launched beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def launch(
        self,
        collective: Callable[[bool], dist.Work | None],
        *,
        before: Callable[[], None] = _nothing,
        after: Callable[[], None] = _nothing,
    ) -> Ticket:
        """Run `before`, `collective(async_op)` and `after` once the work queued so far is done."""
        if self._stream is None:
            before()
            work = collective(True)
            assert work is not None, "an asynchronous collective returns a handle"

            def wait() -> None:
                work.wait()
                after()

            return Ticket(wait)
        with self.entered():
            before()
            collective(False)
            after()
            done = self._stream.record_event()
        return Ticket(
            lambda: torch.cuda.current_stream().wait_event(done), before, collective, after
        )
