"""The record of one forward pass: which units its calls entered, and how far backward has come."""

from __future__ import annotations

from collections.abc import Iterator

from cs336_systems.parallel.fsdp_unit import Unit


class Entry:
    """One call that entered a unit, at its place in the forward pass."""

    __slots__ = (
        *("follows_trained", "is_watched", "position", "reads_weights", "trace", "unit", "version"),
    )

    def __init__(self, unit: Unit, trace: Trace, *, reads_weights: bool) -> None:
        self.unit = unit
        self.trace = trace
        self.position = len(trace.entries)
        self.reads_weights = reads_weights
        self.version = unit.version
        self.follows_trained = trace.has_trained
        """Whether a gradient may pass it on some rank, even if it is frozen."""
        self.is_watched = False
        """Whether the backward pass will announce itself."""


class Trace:
    """The entries of a forward pass in their order.

    The backward pass comes by them in reverse, since autograd runs what was recorded last first.
    Not all need to take part: on this rank a loss may not depend on them.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.has_trained = False
        """Whether a unit with trained weights was entered."""
        self._first: dict[Unit, int] = {}
        self._cursor: int | None = None

    def enter(self, unit: Unit, *, reads_weights: bool) -> Entry:
        """Append an entry."""
        entry = Entry(unit, self, reads_weights=reads_weights)
        self._first.setdefault(unit, entry.position)
        self.entries.append(entry)
        self.has_trained = self.has_trained or bool(unit.gradients)
        return entry

    @property
    def units(self) -> list[Unit]:
        """The entered units, in order."""
        return [entry.unit for entry in self.entries]

    @property
    def has_begun(self) -> bool:
        """Whether a backward pass has come by any entry."""
        return self._cursor is not None

    def move_to(self, entry: Entry) -> None:
        """Note that the backward pass is at `entry`."""
        self._cursor = entry.position if self._cursor is None else min(self._cursor, entry.position)

    def to_come(self, down_to: int = 0) -> Iterator[Entry]:
        """Yield watched entries that backward has not come by, from the last to `down_to`."""
        end = len(self.entries) if self._cursor is None else self._cursor
        return (entry for entry in reversed(self.entries[down_to:end]) if entry.is_watched)

    def is_over(self, unit: Unit) -> bool:
        """Whether backward has left all calls that entered `unit`."""
        first = self._first.get(unit)
        return first is None or (self._cursor is not None and first > self._cursor)

    def is_in_last(self, unit: Unit) -> bool:
        """Whether backward is in the last call that entered `unit`, or has left it."""
        first = self._first.get(unit)
        return first is None or (self._cursor is not None and first >= self._cursor)

    def window(self, entry: Entry, num_ahead: int) -> list[Unit]:
        """Return the units of `entry` and of those that backward comes by next."""
        units = [entry.unit]
        for earlier in reversed(self.entries[: entry.position]):
            if len(units) > num_ahead:
                break
            if earlier.is_watched and earlier.unit not in units:
                units.append(earlier.unit)
        return units
