"""Lists on the command line: comma-separated values, each checked, refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cs336_systems.errors import bad, unknown


def listed(
    text: str | None, option: str, default: Sequence[Any], parse: Callable[[str], Any]
) -> tuple[Any, ...]:
    """Return an option's values, each once; without the option, the default.

    Raises: UsageError for an empty list or a value that `parse` refuses.
    """
    if text is None:
        return tuple(default)
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise bad("benchmarks", option, "list at least one value", text)
    return tuple(dict.fromkeys(parse(word) for word in words))


def one_of(option: str, choices: Iterable[str]) -> Callable[[str], str]:
    """Return a parser that lets these names pass."""
    allowed = tuple(choices)

    def parse(word: str) -> str:
        if word not in allowed:
            raise unknown("benchmarks", option, allowed, word)
        return word

    return parse


def at_least(option: str, least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` on."""

    def parse(word: str) -> int:
        if not word.isdigit() or int(word) < least:
            raise bad("benchmarks", option, f"list integers of at least {least}", word)
        return int(word)

    return parse
