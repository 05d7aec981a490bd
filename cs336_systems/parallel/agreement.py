"""Checks that every rank passes or that every rank fails, so that none is left waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.collectives import Group, all_gather_object

T = TypeVar("T")


def agreed(where: str, check: Callable[[], tuple[T, list[str]]], group: Group) -> T:
    """Return the first of what `check` returns if on all ranks it returns with equal lines.

    Raises: what `check` raised; UsageError if it raised on another rank, or if the lines differ.
    """
    failure: Exception | None = None
    lines: list[str] = []
    try:
        result, lines = check()
    except Exception as error:
        failure = error
    report = (None if failure is None else str(failure), _digest(lines))
    reports = all_gather_object(report, group)
    if failure is not None:
        raise failure
    for rank, (text, _) in enumerate(reports):
        if text is not None:
            raise UsageError(f"{where}: rank {rank} was refused: {text}")
    if len({digest for _, digest in reports}) > 1:
        raise _difference(where, all_gather_object(lines, group))
    return result


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _difference(where: str, by_rank: list[list[str]]) -> UsageError:
    """Build the error that names the first line that differs and which ranks say what."""
    for said in zip_longest(*by_rank, fillvalue="nothing"):
        if len(set(said)) > 1:
            break
    got = "; ".join(
        f"{line} on rank {', '.join(str(r) for r, other in enumerate(said) if other == line)}"
        for line in dict.fromkeys(said)
    )
    return bad(where, "arguments", "be the same on every rank", got)
