"""A JSON value that knows its address, so every complaint names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cs336_systems.errors import UsageError, bad

_LONGEST_QUOTE = 70
_LARGEST = 2**63 - 1


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


class _Quote:
    """What was got instead, short enough to keep the message on one line."""

    def __init__(self, raw: object) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        text = repr(self.raw)
        return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


@dataclass(frozen=True)
class Value:
    """A value read from `file` at `key`; its methods return the plain value or refuse it."""

    file: str
    key: str
    raw: Any

    def must(self, rule: str) -> UsageError:
        """Build the error for a value that breaks `rule`."""
        return bad(f"report: {self.file}", self.key, rule, _Quote(self.raw))

    def __getitem__(self, name: str) -> Value:
        child = f"{self.key}.{name}" if self.key else name
        return Value(self.file, child, self.mapping().get(name, NOTHING))

    @property
    def absent(self) -> bool:
        """Whether there is no such key, or it holds null."""
        return self.raw is None or self.raw is NOTHING

    def mapping(self) -> dict[str, Any]:
        """Return the value as an object."""
        if not isinstance(self.raw, dict):
            raise self.must("be an object")
        return self.raw

    def fields(self) -> Iterator[tuple[str, Value]]:
        """Yield every name of an object with its value; an absent object has none."""
        if not self.absent:
            for name in self.mapping():
                yield name, self[name]

    def elements(self) -> Iterator[Value]:
        """Yield every element of a list."""
        if not isinstance(self.raw, list):
            raise self.must("be a list")
        for index, raw in enumerate(self.raw):
            yield Value(self.file, f"{self.key}[{index}]", raw)

    def text(self) -> str:
        """Return the value as a string that is not empty."""
        if not isinstance(self.raw, str) or not self.raw:
            raise self.must("be a non-empty string")
        return self.raw

    def text_or_none(self) -> str | None:
        """Return the value as a string, or None where it is absent."""
        return None if self.absent else self.text()

    def one_of(self, choices: Iterable[str]) -> str:
        """Return the value as one of a closed set of strings."""
        choices = tuple(choices)
        if self.raw not in choices:
            raise self.must(f"be one of {', '.join(choices)}")
        return str(self.raw)

    def number(self, *, zero: bool = False) -> float:
        """Return the value as a finite positive number; `zero` lets 0 pass."""
        rule = "be a number of at least 0" if zero else "be a positive number"
        number = _as_float(self.raw)
        if number is None or not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise self.must(rule)
        return number

    def number_or_none(self) -> float | None:
        """Return the value as a finite positive number, or None where it is absent."""
        return None if self.absent else self.number()

    def any_number(self) -> float | None:
        """Return the value as a number of any sign, infinite or not a number too; null is None."""
        number = _as_float(self.raw)
        if number is None and not self.absent:
            raise self.must("be a number or null")
        return number if number is None or isinstance(self.raw, float) else float(self.integer())

    def integer(self) -> int:
        """Return the value as a whole number of any sign."""
        if isinstance(self.raw, bool) or not isinstance(self.raw, int) or abs(self.raw) > _LARGEST:
            raise self.must("be a whole number of 64 bits")
        return self.raw

    def scalar(self) -> str | int | float | bool:
        """Return the value as a string, a finite number or a truth value."""
        number = _as_float(self.raw)
        if number is not None:
            if not math.isfinite(number):
                raise self.must("be finite")
            return self.integer() if isinstance(self.raw, int) else number
        if not isinstance(self.raw, str | bool):
            raise self.must("be a string, a number or true/false")
        return self.raw


def _as_float(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    try:
        return float(raw)
    except OverflowError:
        return math.inf
