"""One shape for every error a user can cause: who, what the rule is, what was got instead."""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(ValueError):
    """A user's argument broke a rule; `str(error)` is one line fit for a terminal."""


def bad(where: str, name: str, rule: str, got: object) -> UsageError:
    """Build the error for argument `name` of `where`:
    `attention: key must have head dim 64, got 80`."""
    return UsageError(f"{where}: {name} must {rule}, got {got!r}")


def unknown(where: str, name: str, choices: Iterable[str], got: object) -> UsageError:
    """Build the error for a name outside a closed set, listing the set."""
    return bad(where, name, f"be one of {', '.join(choices)}", got)
