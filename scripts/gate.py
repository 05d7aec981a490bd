"""Fail when this tree is slower than an earlier commit, or no longer counts the same.

Both are measured in one job, taking turns, so that a slow or busy machine slows both. A case that
looks slower is measured again before it counts.

The base is the first of: --base; $GATE_BASE; the merge base with the upstream default branch, when
that is not HEAD; the newest first-parent ancestor at least six hours older than HEAD; HEAD~1.
Measured against it is the tree as it lies here, so `--base HEAD` judges what is not committed yet.

A commit message after the base may declare a wanted change of cases, one line each:
    Benchmark-change: PATTERN OF CASE IDS: reason

Exit status: 0 passed or nothing to gate, 1 failed, 2 could not measure or compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gate_base import (
    Base,
    GateError,
    NothingToGateError,
    choose_base,
    declared_changes,
    git,
)

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 30

# pytest's own statuses for "cannot be collected", "no such option" and "no cases".
BASE_LACKS_BENCHMARKS = {2: "collection fails", 4: "an option is unknown", 5: "no cases"}


class Done(NamedTuple):
    """How a command ended and what it said."""

    status: int
    output: str

    def tail(self) -> str:
        """Return the last lines of the output."""
        return "\n".join(self.output.strip().splitlines()[-TAIL_LINES:])


class Flag(NamedTuple):
    """One objection of the comparison to one case."""

    kind: str
    case: str
    fullname: str
    """The case's pytest id, empty where it has none."""


SLOWER = "regression"
"""The kind of objection that a busy machine can cause, and a second look can take back."""

FURTHER_LOOKS = 2
"""A neighbour's burst of work outlasts one look at a case; a real slow-down outlasts any number."""

Measure = Callable[[Path, Path, Sequence[str]], Done]
"""(tree, JSON to write, pytest ids or none for all) -> how pytest ended."""
Compare = Callable[[Sequence[Path], Sequence[Path], Mapping[str, str]], list[Flag]]
"""(base JSONs, head JSONs, {pattern: reason} that are declared) -> what is objected to."""


def say(line: str) -> None:
    """Print at once: between two lines there may be minutes."""
    print(line, flush=True)


# --- measuring and comparing for real ---


def run_in(tree: Path, command: Sequence[str]) -> Done:
    """Run Python on a tree's own packages; no process of it outlives this call."""
    inherited = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    environment = inherited | {
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'cs336-basics'}",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    return Done(child.returncode, output)


def measure_with_pytest(tree: Path, json_path: Path, cases: Sequence[str]) -> Done:
    """Measure a tree's gate cases, or only the named ones."""
    options = ["--gate", "--rounds=20", "-p", "no:xdist", "-q", f"--benchmark-json={json_path}"]
    return run_in(tree, ["-m", "pytest", *(cases or ["benchmarks/"]), *options])


def compare_with_report(
    base: Sequence[Path], head: Sequence[Path], allowed: Mapping[str, str]
) -> list[Flag]:
    """Compare through the report's command line, whose table is printed.

    Raises: GateError when it refuses.
    """
    verdict = head[0].with_name("verdict.json")
    verdict.unlink(missing_ok=True)
    command = ["-m", "cs336_systems.report", "compare"]
    command += [",".join(map(str, paths)) for paths in (base, head)]
    command += [word for item in allowed.items() for word in ("--allow", "=".join(item))]
    done = run_in(ROOT, [*command, "--json", str(verdict)])
    if done.status not in (0, 1) or not verdict.exists():
        raise GateError(f"gate: the comparison ended with status {done.status}\n{done.tail()}")
    say(done.output.rstrip())
    flags = [
        Flag(failure["kind"], outcome["case"], outcome["fullname"])
        for outcome in json.loads(verdict.read_text())["outcomes"]
        if outcome["failed"]
        for failure in outcome["failures"]
    ]
    if bool(flags) != bool(done.status):
        raise GateError(f"gate: the comparison has {len(flags)} objections, status {done.status}")
    return flags


# --- the gate ---


@dataclass(kw_only=True)
class Gate:
    """Measures two trees in turns, compares, and measures again what looks slower."""

    head: Path
    base: Path
    out: Path
    """Where every JSON goes."""
    measure: Measure = measure_with_pytest
    compare: Compare = compare_with_report
    repeats: int = 3
    allowed: Mapping[str, str] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)
    files: dict[str, list[Path]] = field(default_factory=lambda: {"base": [], "head": []})

    def run(self) -> list[Flag]:
        """Return what the comparison still objects to after further looks.

        Raises: NothingToGateError when the base has no such benchmarks, else GateError.
        """
        self._measure_in_turns(())
        flags = self._compare()
        for _ in range(FURTHER_LOOKS):
            slower = sorted({flag.fullname for flag in flags if flag.kind == SLOWER})
            if not slower:
                break
            say(f"gate: measuring again what looks slower: {', '.join(slower)}")
            self._measure_in_turns(slower)
            flags = self._compare()
        return flags

    def num_cases(self) -> int:
        """Count the timed cases of the first run of HEAD."""
        measured: Any = json.loads(self.files["head"][0].read_text())
        return len(measured["benchmarks"])

    def _measure_in_turns(self, cases: Sequence[str]) -> None:
        for repeat in range(self.repeats):
            # Whoever goes second finds a warmer machine, so the order alternates.
            for side in ("base", "head") if repeat % 2 == 0 else ("head", "base"):
                self._measure_once(side, cases, f"{repeat + 1}/{self.repeats}")

    def _measure_once(self, side: str, cases: Sequence[str], progress: str) -> None:
        say(f"gate: [{time.monotonic() - self.begin:6.1f} s] measuring {side} {progress}")
        tree = self.base if side == "base" else self.head
        json_path = self.out / f"{side}-{len(self.files[side]) + 1}.json"
        done = self.measure(tree, json_path, cases)
        if side == "base" and not cases and done.status in BASE_LACKS_BENCHMARKS:
            raise NothingToGateError(BASE_LACKS_BENCHMARKS[done.status])
        if done.status != 0 and side == "base" and not self.files["base"]:
            # A broken base must not keep out the change that mends it, if that is what this is.
            self._measure_once("head", cases, "after the base failed")
            say(done.tail())
            raise NothingToGateError(f"its run ended with status {done.status}, HEAD's passed")
        if done.status != 0:
            raise GateError(
                f"gate: measuring {side} ended with status {done.status}\n{done.tail()}"
            )
        if not json_path.exists() or not json_path.stat().st_size:
            raise GateError(f"gate: measuring {side} wrote no measurements\n{done.tail()}")
        self.files[side].append(json_path)

    def _compare(self) -> list[Flag]:
        say(f"gate: [{time.monotonic() - self.begin:6.1f} s] comparing")
        return self.compare(self.files["base"], self.files["head"], self.allowed)


@contextmanager
def checked_out(repo: Path, sha: str) -> Iterator[Path]:
    """Give a tree of a commit, gone again afterwards whatever happens."""
    place = Path(tempfile.mkdtemp(prefix="gate-"))
    tree = place / "base"
    try:
        git(repo, "worktree", "add", "--quiet", "--detach", "--force", str(tree), sha)
        yield tree
    finally:
        # Twice forced: one that was interrupted while being made is still locked.
        with suppress(GateError):
            git(repo, "worktree", "remove", "--force", "--force", str(tree))
        shutil.rmtree(place, ignore_errors=True)
        git(repo, "worktree", "prune")


def gate(repo: Path, base: Base, **settings: Any) -> int:
    """Hold the working tree at `repo` against a commit; return the exit status."""
    short = base.sha[:12]
    allowed = declared_changes(repo, base.sha)
    subject = git(repo, "log", "-1", "--format=%s", base.sha)
    say(f"gate: base {short} ({base.chosen_as}): {subject}")
    for pattern, reason in allowed.items():
        say(f"gate: declared: {pattern}: {reason}")
    out = repo / "out" / "gate"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with checked_out(repo, base.sha) as tree:
        running = Gate(head=repo, base=tree, out=out, allowed=allowed, **settings)
        try:
            if not (tree / "benchmarks").is_dir():
                raise NothingToGateError("it has no benchmarks/")
            flags = running.run()
        except NothingToGateError as why:
            say(f"gate: base {short} cannot be measured ({why}): nothing to gate")
            return 0
    if flags:
        say("gate: to declare a wanted change, commit with `Benchmark-change: PATTERN: reason`")
        listed = ", ".join(f"{flag.case} ({flag.kind})" for flag in flags)
        say(f"gate: FAILED against base {short}: {listed}")
        return 1
    say(f"gate: passed ({running.num_cases()} cases, base {short})")
    return 0


def stop(number: int, _frame: object) -> NoReturn:
    """Turn a request to end into an exception, so that everything is cleaned up on the way."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="REV", help="the commit to hold this tree against")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each side (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    signal.signal(signal.SIGTERM, stop)
    try:
        base = choose_base(ROOT, args.base, os.environ.get("GATE_BASE"))
        return gate(ROOT, base, repeats=args.repeats)
    except NothingToGateError as reason:
        print(reason)
        return 0
    except GateError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
