"""The ranks that consecutive cases share: starting them takes longer than most cases."""

from __future__ import annotations

from cs336_systems.parallel.launch import RankPool

# Rounds of a slow case are bounded by seconds, but never fewer than three.
_TIMEOUT_S = 300.0


class RankSlot:
    """Holds at most one pool of ranks."""

    def __init__(self) -> None:
        self._pool: RankPool | None = None

    def get(self, world_size: int, backend: str, *, timeout_s: float = _TIMEOUT_S) -> RankPool:
        """Return ranks of this number and backend, ending others."""
        pool = self._pool
        if pool is None or (pool.world_size, pool.backend) != (world_size, backend):
            self.clear()
            pool = self._pool = RankPool(world_size, backend=backend, timeout_s=timeout_s)
        pool.timeout_s = timeout_s
        return pool

    def clear(self) -> None:
        """End the ranks."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None
