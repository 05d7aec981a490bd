"""`python -m cs336_systems.report FILE... --out reports/`, `... compare BASE HEAD`, or
`... repeats RUN RUN...`."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cs336_systems.errors import UsageError, bad
from cs336_systems.report import verdict
from cs336_systems.report.cells import markdown_table
from cs336_systems.report.compare import THRESHOLDS, Rules, compare
from cs336_systems.report.frame import load
from cs336_systems.report.publish import publish, replace_files
from cs336_systems.report.repeats import COMPARED, repeat_tables

_METRICS = ("median", "mean", "min", "q20", "q80")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; a user's fault is one line and 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["compare"]:
            return _compare(_compare_parser().parse_args(arguments[1:]))
        if arguments[:1] == ["repeats"]:
            return _repeats(_repeats_parser().parse_args(arguments[1:]))
        return _report(_report_parser().parse_args(arguments))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cs336_systems.report",
        description="Turn benchmark JSON into tables, plots and a page.",
        epilog="To hold one run against another: python -m cs336_systems.report compare --help; "
        "several runs of one comparison: python -m cs336_systems.report repeats --help",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON or journal")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the report")
    parser.add_argument("--readme", type=Path, help="README whose marked parts are written anew")
    parser.add_argument("--title", default="Benchmark report", help="heading of index and page")
    return parser


def _report(options: argparse.Namespace) -> int:
    frame = load(options.files)
    notes = publish(frame, options.out, options.title, options.readme)
    for line in (*frame.warnings, *notes):
        print(line, file=sys.stderr)
    print(f"report: {len(frame.cases)} cases in {options.out / 'report.html'}")
    return 0


def _compare_parser() -> argparse.ArgumentParser:
    limits = "; ".join(
        f"{study} {', '.join(f'{limit:g} on {kind}' for kind, limit in kinds.items())}"
        for study, kinds in THRESHOLDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m cs336_systems.report compare",
        description="Hold a run against an earlier one. Exit 0: nothing to report; 1: a case "
        "regressed, appeared, disappeared or changed; 2: the files cannot be compared.",
    )
    many = "one file, or several separated by commas, of which each case's best time counts"
    parser.add_argument("base", metavar="BASE", help=many)
    parser.add_argument("head", metavar="HEAD", help=many)
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="STUDY=PERCENT",
        help=f"how much slower a study may be; otherwise, in percent: {limits}",
    )
    parser.add_argument("--min-ms", type=float, default=Rules.min_ms, help="gate no shorter times")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN=REASON",
        help="declare a change of the cases whose id matches, e.g. 'model_pass[*size=xl]=why'",
    )
    parser.add_argument("--metric", choices=_METRICS, default="median")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the outcome for a script")
    return parser


def _compare(options: argparse.Namespace) -> int:
    if not options.min_ms >= 0:
        raise bad("report", "--min-ms", "be at least 0", options.min_ms)
    rules = Rules(
        thresholds=dict(map(_threshold, options.threshold)),
        min_ms=options.min_ms,
        allow=dict(map(_allowance, options.allow)),
        metric=options.metric,
    )
    base, head = (
        [load([path]) for path in side.split(",")] for side in (options.base, options.head)
    )
    comparison = compare(base, head, rules)
    for line in dict.fromkeys(line for frame in (*base, *head) for line in frame.warnings):
        print(line, file=sys.stderr)
    for pattern in comparison.unused:
        print(f"report: --allow {pattern} declares nothing that changed", file=sys.stderr)
    if options.json is not None:
        _write_json(options.json.resolve(), verdict.as_json(comparison))
    print(verdict.table(comparison))
    print(verdict.summary(comparison))
    return 0 if comparison.passed else 1


def _repeats_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cs336_systems.report repeats",
        description="Print, in Markdown, how others compare with our rows over several runs of the "
        "same cases: the median of the runs' ratios, the least and the most.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="RUN", help="JSON or journal")
    parser.add_argument("--study", default="attention_shapes", help=", ".join(COMPARED))
    return parser


def _repeats(options: argparse.Namespace) -> int:
    frames = [load([path]) for path in options.files]
    for table in repeat_tables(frames, options.study):
        print(f"## {table.title}\n\n{markdown_table(table)}\n")
    return 0


def _write_json(path: Path, text: str) -> None:
    try:
        replace_files({path.parent: {path: text.encode()}})
    except OSError as error:
        raise UsageError(f"report: {path}: cannot be written: {error.strerror}") from None


def _threshold(option: str) -> tuple[str, float]:
    study, _, percent = option.partition("=")
    try:
        limit = float(percent)
    except ValueError:
        limit = math.nan
    if not study or not limit >= 0:
        raise bad("report", "--threshold", "be STUDY=PERCENT", option)
    return study, limit


def _allowance(option: str) -> tuple[str, str]:
    # An id holds '=' itself, so the pattern ends at the first one behind its bracket or star.
    found = re.fullmatch(r"(.*?[\]*])=(.+)", option) or re.fullmatch(r"([^=[]+)=(.+)", option)
    if found is None:
        raise bad("report", "--allow", "be PATTERN=REASON", option)
    return found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())
