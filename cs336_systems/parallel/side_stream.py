"""Collectives beside the computation, and the order between the two.

On a GPU they run on a stream of high priority, with events in place of waits of the host. On the
CPU they run on the backend's own threads, and what follows them runs when somebody waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


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


class SideStream:
    """Where collectives run while the current stream computes.

    Tensors it touches are allocated by the caller, on the stream that computes, and freed after
    the ticket was waited for. The allocator thus reuses them in that stream's order, and memory is
    the same in every step, which `record_stream` would not give.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    @property
    def is_beside(self) -> bool:
        """Whether there is a stream, so that collectives need no handles to run beside others."""
        return self._stream is not None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Queue what the block launches behind all that is queued so far."""
        if self._stream is None:
            yield
            return
        self._computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._computing)
        with torch.cuda.stream(self._stream):
            yield

    def hold(self, tensors: list[Tensor]) -> None:
        """Within `entered`, keep tensors of the stream that computes until what was launched so far
        has read them.

        Those of two calls are kept at most: before older ones' memory goes back to that stream, it
        waits for what has long happened.
        """
        assert self._stream is not None
        self._held.append((self._stream.record_event(), tensors))
        if len(self._held) > 2:
            done, _ = self._held.popleft()
            self._computing.wait_event(done)

    def join(self) -> None:
        """Let what the caller computes from here on come after all that was launched beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._held.clear()

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
