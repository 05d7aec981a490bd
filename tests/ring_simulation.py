"""Collectives carried out part by part, with every message counted: what closed forms are held
against.

A rank's message is n parts; a part's value says which ranks are in it, and how often.
"""

from __future__ import annotations

from collections import Counter

Part = Counter[int]
"""How often each rank's own part is in the sum."""


class Network:
    """n ranks, each with a message and a link of its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.held: list[list[Part]] = [
            [Counter({rank: 1}) for _ in range(world_size)] for rank in range(world_size)
        ]
        self.num_steps = 0
        self.num_parts_in_series = 0
        """Of each step what the busiest direction of a link carried, all steps together."""
        self.num_parts_sent = [0] * world_size

    def step(self, messages: list[tuple[int, int, dict[int, Part]]]) -> list[dict[int, Part]]:
        """Deliver (from, to, parts by place) all at once; returns what each rank got."""
        assert messages
        sent, received = [0] * self.world_size, [0] * self.world_size
        got: list[dict[int, Part]] = [{} for _ in range(self.world_size)]
        for source, target, parts in messages:
            assert source != target
            sent[source] += len(parts)
            received[target] += len(parts)
            for place, part in parts.items():
                got[target][place] = got[target].get(place, Counter()) + part
        self.num_steps += 1
        self.num_parts_in_series += max(*sent, *received)
        self.num_parts_sent = [a + b for a, b in zip(self.num_parts_sent, sent, strict=True)]
        return got

    def whole(self, rank: int) -> dict[int, Part]:
        """Return a rank's message by place."""
        return dict(enumerate(self.held[rank]))

    def add(self, got: list[dict[int, Part]]) -> None:
        """Add what was got to what is held."""
        for mine, parts in zip(self.held, got, strict=True):
            for place, part in parts.items():
                mine[place] = mine[place] + part

    def replace(self, got: list[dict[int, Part]]) -> None:
        """Overwrite what is held by what was got."""
        for mine, parts in zip(self.held, got, strict=True):
            for place, part in parts.items():
                mine[place] = part

    @property
    def is_reduced(self) -> bool:
        """Whether every rank holds every rank's part exactly once, everywhere."""
        total = Counter(range(self.world_size))
        return all(part == total for mine in self.held for part in mine)


def _round_the_ring(network: Network, offset: int, step: int) -> list[dict[int, Part]]:
    n = network.world_size
    return network.step(
        [
            (rank, (rank + 1) % n, {place: network.held[rank][place]})
            for rank in range(n)
            for place in [(rank + offset - step) % n]
        ]
    )


def reduce_scatter(n: int) -> Network:
    """After it, rank r holds the sum of part r + 1."""
    network = Network(n)
    for step in range(n - 1):
        network.add(_round_the_ring(network, 0, step))
    total = Counter(range(n))
    assert all(network.held[rank][(rank + 1) % n] == total for rank in range(n))
    return network


def all_gather(network: Network) -> Network:
    """Spread the sums that `reduce_scatter` left."""
    for step in range(network.world_size - 1):
        network.replace(_round_the_ring(network, 1, step))
    return network


def ring(n: int) -> Network:
    """The ring all-reduce."""
    return all_gather(reduce_scatter(n))


def whole_ring(n: int) -> Network:
    """Whole messages go round, everyone adds."""
    network = Network(n)
    passing = [network.whole(rank) for rank in range(n)]
    for _ in range(n - 1):
        passing = network.step([(rank, (rank + 1) % n, passing[rank]) for rank in range(n)])
        network.add(passing)
    return network


def everyone_to_everyone(n: int) -> Network:
    """All whole messages at once."""
    network = Network(n)
    if n > 1:
        pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
        network.add(network.step([(a, b, network.whole(a)) for a, b in pairs]))
    return network


def direct(n: int) -> Network:
    """Part r of all to rank r, which sends the sum to all."""
    network = Network(n)
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    if pairs:
        network.add(network.step([(a, b, {b: network.held[a][b]}) for a, b in pairs]))
        network.replace(network.step([(a, b, {a: network.held[a][a]}) for a, b in pairs]))
    return network


def tree(n: int) -> Network:
    """Pairs of growing distance up to rank 0, and down again."""
    network = Network(n)
    distances = [2**k for k in range(n.bit_length()) if 2**k < n]
    for distance in distances:
        up = [(a + distance, a) for a in range(0, n - distance, 2 * distance)]
        network.add(network.step([(a, b, network.whole(a)) for a, b in up]))
    for distance in reversed(distances):
        down = [(a, a + distance) for a in range(0, n - distance, 2 * distance)]
        network.replace(network.step([(a, b, network.whole(a)) for a, b in down]))
    return network


def broadcast(n: int) -> Network:
    """Rank 0's parts go down a chain, one after the other; every link works at once."""
    network = Network(n)
    for step in range(2 * n - 2):
        moves = [(rank, step - rank) for rank in range(n - 1) if 0 <= step - rank < n]
        got = network.step([(r, r + 1, {place: network.held[r][place]}) for r, place in moves])
        network.replace(got)
    assert all(part == Counter([0]) for mine in network.held for part in mine) or n == 1
    return network
