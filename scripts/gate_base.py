"""Choose the commit that a tree is held against, and read which changes since then are declared."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

OLDER_SECONDS = 6 * 3600
DECLARATION = re.compile(r"^Benchmark-change:\s*(?P<pattern>\S.*?):\s+(?P<reason>\S.*)$", re.M)


class GateError(Exception):
    """Measuring or comparing went wrong; the first line is fit for a terminal."""


class NothingToGateError(Exception):
    """There is no earlier state that this one could be held against."""


class Base(NamedTuple):
    """The commit that HEAD is held against."""

    sha: str
    chosen_as: str


def git(repo: Path, *arguments: str) -> str:
    """Return what a git command prints.

    Raises: GateError when it fails.
    """
    done = subprocess.run(["git", "-C", repo, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise GateError(f"gate: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(repo: Path, revision: str) -> str | None:
    """Return the full name of a revision's commit, None when there is no such commit here."""
    try:
        return git(repo, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except GateError:
        return None


def choose_base(repo: Path, asked: str | None, from_environment: str | None) -> Base:
    """Choose the commit to hold HEAD against, in the order that the module names.

    Raises: GateError for an unknown --base, NothingToGateError when there is no earlier commit.
    """
    if asked:
        if found := commit_of(repo, asked):
            return Base(found, "--base")
        raise GateError(f"gate: --base must be a commit of this repository, got {asked!r}")
    # A push of a new branch names a commit of zeros, one after a forced push a commit that is gone.
    if from_environment and (found := commit_of(repo, from_environment)):
        return Base(found, "GATE_BASE")
    return upstream_base(repo) or earlier_base(repo)


def upstream_base(repo: Path) -> Base | None:
    """Return where HEAD left the upstream default branch, None when HEAD lies on it."""
    for branch in ("origin/HEAD", "origin/main"):
        if commit_of(repo, branch):
            try:
                found = git(repo, "merge-base", "HEAD", branch)
            except GateError:  # no common history
                continue
            if found != commit_of(repo, "HEAD"):
                return Base(found, f"merge base with {branch}")
    return None


def earlier_base(repo: Path) -> Base:
    """Return the state before the latest stretch of work, or simply the commit before.

    Raises: NothingToGateError when HEAD is the first commit, or the only one cloned.
    """
    log = git(repo, "log", "--first-parent", "--format=%H %ct")
    history = [line.split() for line in log.splitlines()]
    latest = int(history[0][1])
    for sha, committed in history[1:]:
        if latest - int(committed) >= OLDER_SECONDS:
            return Base(sha, "newest first-parent ancestor of at least six hours before")
    if len(history) > 1:
        return Base(history[1][0], "HEAD~1")
    raise NothingToGateError("gate: no base commit, nothing to gate")


def declared_changes(repo: Path, base: str) -> dict[str, str]:
    """Return {pattern: reason} of the changes that commit messages since `base` declare."""
    messages = git(repo, "log", "--format=%B", f"{base}..HEAD")
    return {match["pattern"]: match["reason"].strip() for match in DECLARATION.finditer(messages)}
