"""Rank 0 prepares, the others wait: for hours if need be, since no collective is under way."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.2
# For the store to be there, not for what rank 0 does.
_JOIN = timedelta(minutes=5)


def is_launched() -> bool:
    """Tell whether this process is a rank that torchrun, or a launcher like it, has started."""
    return "RANK" in os.environ


class RankTurn:
    """One word from rank 0 to the others, through the launcher's store."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self.rank = 0
        if is_launched():
            self._store, self.rank, _ = next(rendezvous("env://", timeout=_JOIN))
        # A launcher that starts failed ranks again keeps its store, and what was said in it.
        self._key = f"cs336-systems/word/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def say(self, word: str) -> None:
        """Let the other ranks go on."""
        if self._store is not None:
            self._store.set(self._key, word)

    def hear(self) -> str:
        """Wait for rank 0's word, heeding signals; one that has ended has said nothing."""
        assert self._store is not None
        try:
            while not self._store.check([self._key]):
                time.sleep(_POLL_S)
            return self._store.get(self._key).decode()
        except DistError:
            return ""
