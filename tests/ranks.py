"""One pool of ranks for each size and backend, shared by all tests of this process.

Starting ranks takes seconds, a call to ranks that are there takes a millisecond. Functions for them
are best kept in a module that imports no pytest.
"""

from __future__ import annotations

import atexit
import functools

from cs336_systems.parallel.launch import RankPool


@functools.cache
def pool(world_size: int, backend: str = "gloo") -> RankPool:
    ranks = RankPool(world_size, backend=backend)
    atexit.register(ranks.close)
    return ranks
