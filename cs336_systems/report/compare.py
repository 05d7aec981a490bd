"""Base against head: pairs cases, holds times to thresholds and counts to equality.

Of repeated files, head's fastest is held against base's median: a neighbour's work slows some
processes and a lucky layout of memory speeds some up, and neither may condemn the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import median

from cs336_systems.errors import UsageError
from cs336_systems.report.frame import Frame
from cs336_systems.report.side import Repeats, by_case, unlike

# Percent by which a time may grow, by study and device kind; `*` is every other study. Two runs in
# one job on shared CPU cores differ by up to a quarter; on a GPU nobody shares, by a few percent.
THRESHOLDS: dict[str, dict[str, float]] = {
    "*": {"cpu": 30.0, "cuda": 10.0},
    # Rounds that were not warmed up are this study's subject, so it scatters more.
    "warmup": {"cpu": 60.0, "cuda": 30.0},
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a comparison lets pass."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Percent by study, in place of the table's."""
    min_ms: float = 1.0
    """Below this time in base, a case's time is shown and not gated."""
    allow: Mapping[str, str] = field(default_factory=dict)
    """Reasons for declared changes, by pattern of case id: `*` and `?` are wild."""
    metric: str = "median"

    def limit(self, study: str, kind: str) -> float:
        """Return the percent by which a study's times may grow on a kind of device."""
        table = THRESHOLDS.get(study, THRESHOLDS["*"])
        return self.thresholds.get(study, table.get(kind, table["cuda"]))

    def declaring(self, case: str) -> Iterator[str]:
        """Yield the patterns that a case id matches."""
        for pattern in self.allow:
            # A case id is full of brackets, which fnmatch would read as sets of letters.
            if fnmatchcase(case, pattern.replace("[", "[[]")):
                yield pattern


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One way in which a case of head is not as in base."""

    kind: str
    """regression, appeared, disappeared, status, counts or clock."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case in base and head."""

    case: str
    fullname: str
    base_ms: float | None
    """The median over base's files."""
    head_ms: float | None
    """The least of head's files."""
    limit_percent: float
    gated: bool
    """Whether the time was held to the limit."""
    failures: tuple[Failure, ...]
    declared: str | None
    """Why the failures are wanted."""

    @property
    def change_percent(self) -> float | None:
        """How much slower head is; negative is faster."""
        if self.base_ms is None or self.head_ms is None:
            return None
        return 100 * (self.head_ms / self.base_ms - 1)

    @property
    def failed(self) -> bool:
        """Whether the case fails the comparison."""
        return bool(self.failures) and self.declared is None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All outcomes, worst first."""

    outcomes: tuple[Outcome, ...]
    rules: Rules
    unused: tuple[str, ...]
    """Patterns that declared nothing."""

    @property
    def flagged(self) -> tuple[str, ...]:
        """The ids of the cases that fail."""
        return tuple(outcome.case for outcome in self.outcomes if outcome.failed)

    @property
    def fullnames(self) -> tuple[str, ...]:
        """The pytest names of the cases that fail, to measure those again."""
        names = [outcome.fullname for outcome in self.outcomes if outcome.failed]
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def passed(self) -> bool:
        """Whether nothing fails."""
        return not self.flagged


def compare(
    base: Frame | Sequence[Frame], head: Frame | Sequence[Frame], rules: Rules | None = None
) -> Comparison:
    """Return how head differs from base.

    Raises: UsageError when the two were not measured on like machines and versions.
    """
    rules = rules or Rules()
    base_frames = [base] if isinstance(base, Frame) else list(base)
    head_frames = [head] if isinstance(head, Frame) else list(head)
    differences = unlike(base_frames, head_frames)
    if differences:
        raise UsageError(f"report: compare refused: {'; '.join(differences)}")
    before, after = by_case(base_frames), by_case(head_frames)
    keys = dict.fromkeys((*before, *after))
    outcomes = [_outcome(before.get(key), after.get(key), rules) for key in keys]
    failing = [outcome.case for outcome in outcomes if outcome.failures]
    used = {pattern for case in failing for pattern in rules.declaring(case)}
    return Comparison(
        outcomes=tuple(sorted(outcomes, key=_worst_first)),
        rules=rules,
        unused=tuple(pattern for pattern in rules.allow if pattern not in used),
    )


def _outcome(base: Repeats | None, head: Repeats | None, rules: Rules) -> Outcome:
    row = (head or base or Repeats(())).rows[0]
    limit = rules.limit(row["study"], row["device_kind"])
    base_times = base.times(rules.metric) if base else []
    head_times = head.times(rules.metric) if head else []
    base_ms = median(base_times) if base_times else None
    head_ms = min(head_times, default=None)
    gated = base_ms is not None and head_ms is not None and base_ms >= rules.min_ms
    failures = _differences(base, head)
    if gated and base_ms and head_ms and head_ms > base_ms * (1 + limit / 100):
        slower = f"{100 * (head_ms / base_ms - 1):.1f} % slower, {limit:g} % allowed"
        failures.insert(0, Failure(kind="regression", detail=slower))
    reasons = [rules.allow[pattern] for pattern in rules.declaring(row["id"])]
    return Outcome(
        case=row["id"],
        fullname=row["fullname"],
        base_ms=base_ms,
        head_ms=head_ms,
        limit_percent=limit,
        gated=gated,
        failures=tuple(failures),
        declared=reasons[0] if failures and reasons else None,
    )


def _differences(base: Repeats | None, head: Repeats | None) -> list[Failure]:
    """Return in what base and head differ besides time."""
    if base is None:
        return [Failure(kind="appeared", detail="only in head")]
    if head is None:
        return [Failure(kind="disappeared", detail="only in base")]
    if base.status != head.status:
        return [Failure(kind="status", detail=f"{base.status} -> {head.status}")]
    failures = []
    if base.status == "timed" and base.clocks() != head.clocks():
        detail = f"base {base.clocks()}; head {head.clocks()}"
        failures.append(Failure(kind="clock", detail=detail))
    before, after = base.counts(), head.counts()
    for name in sorted({*before, *after}):
        change = _count_change(before.get(name, set()), after.get(name, set()))
        if change is not None:
            failures.append(Failure(kind="counts", detail=f"{name} {change}"))
    return failures


def _count_change(base: set[int], head: set[int]) -> str | None:
    """Return how an exact count differs, also between repeated files of one side."""
    if base == head and len(base) == 1:
        return None
    words = [" or ".join(map(str, sorted(side))) or "absent" for side in (base, head)]
    change = f" ({min(head) - min(base):+d})" if len(base) == len(head) == 1 else ""
    return f"base {words[0]}, head {words[1]}{change}"


def _worst_first(outcome: Outcome) -> tuple[bool, bool, float, str]:
    change = outcome.change_percent
    # A failure without two times is as bad as any slowdown.
    rank = change if change is not None else float("inf") if outcome.failures else float("-inf")
    return (not outcome.failed, not outcome.failures, -rank, outcome.case)
