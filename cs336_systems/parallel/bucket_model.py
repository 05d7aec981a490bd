"""How long gradients in buckets keep a step waiting after its backward pass, on paper.

The backward pass fills the buckets one after the other; each travels as soon as it is full and the
one before it has arrived. As in the course's exercise, filling a bucket takes as long as its bytes
take to travel: then all buckets but the last are hidden, and what each call costs on top is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cs336_systems.errors import bad


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What is to be reduced, and over what.

    Raises: UsageError for sizes that are not positive.
    """

    num_bytes: float
    """s: all of them together, as they travel."""
    bytes_per_s: float
    """w: at which a collective's bytes travel."""
    call_seconds: float
    """o: what a collective costs beside its bytes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise bad("Gradients", name, "be positive", value)

    def exposed_seconds(self, num_buckets: float) -> float:
        """Return the time between the last gradient's and the last average's arrival.

        Cost: s / (n_b w) + n_b o. The backward pass ends at s / w. The first bucket is full at
        s / (n_b w); from then on calls follow one another without a gap, n_b of them, each
        s / (n_b w) + o.
        """
        if num_buckets < 1:
            raise bad("exposed_seconds", "num_buckets", "be at least 1", num_buckets)
        last_bucket = self.num_bytes / (num_buckets * self.bytes_per_s)
        return last_bucket + num_buckets * self.call_seconds

    @property
    def best_num_buckets(self) -> int:
        """The whole number of buckets with the least exposed time.

        Source: d/dn (s / (n w) + n o) = 0 at n = sqrt(s / (w o)); the sum is convex in n.
        """
        ideal = math.sqrt(self.num_bytes / (self.bytes_per_s * self.call_seconds))
        below = max(math.floor(ideal), 1)
        return min(below, below + 1, key=self.exposed_seconds)

    @property
    def best_bucket_bytes(self) -> float:
        """The bucket size with the least exposed time: sqrt(s w o), at most all of it."""
        ideal = math.sqrt(self.num_bytes * self.bytes_per_s * self.call_seconds)
        return min(ideal, self.num_bytes)

    @property
    def least_exposed_seconds(self) -> float:
        """The exposed time at that size: 2 sqrt(s o / w), half of it bytes and half of it calls."""
        return self.exposed_seconds(self.num_bytes / self.best_bucket_bytes)
