"""Which commit is a tree held against, and which changes are declared?"""

from __future__ import annotations

from pathlib import Path

import pytest
from gate_base import GateError, NothingToGateError, choose_base, declared_changes
from git_repository import Repository


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repo")


def chosen(repo: Repository, asked: str | None = None, env: str | None = None) -> tuple[str, str]:
    return tuple(choose_base(repo.path, asked, env))  # type: ignore[return-value]


def test_first_commit_has_no_base(repo: Repository) -> None:
    repo.commit("one")
    with pytest.raises(NothingToGateError, match=r"^gate: no base commit, nothing to gate$"):
        chosen(repo)


def test_base_is_the_commit_before_a_short_history(repo: Repository) -> None:
    repo.commit("one")
    before = repo.commit("two", hours=1)
    repo.commit("three", hours=2)
    assert chosen(repo) == (before, "HEAD~1")


def test_base_is_the_last_commit_of_earlier_work(repo: Repository) -> None:
    repo.commit("old")
    before = repo.commit("just old enough", hours=10)
    repo.commit("young", hours=10.1)
    repo.commit("head", hours=16)
    sha, why = chosen(repo)
    assert (sha, "six hours" in why) == (before, True)


def test_base_follows_first_parents(repo: Repository) -> None:
    before = repo.commit("trunk")
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("side work", hours=1)
    repo.git("checkout", "-q", "main")
    repo.commit("trunk again", hours=8)
    repo.git("merge", "-q", "--no-ff", "-m", "merge", "side", hours=9)
    assert chosen(repo)[0] == before


def test_base_is_where_a_branch_left_upstream(repo: Repository) -> None:
    repo.commit("one")
    left = repo.commit("two")
    repo.git("update-ref", "refs/remotes/origin/main", "HEAD")
    repo.commit("branch work", hours=1)
    repo.commit("more", hours=20)
    assert chosen(repo) == (left, "merge base with origin/main")


def test_head_on_upstream_is_held_against_earlier_work(repo: Repository) -> None:
    before = repo.commit("one")
    repo.commit("two")
    repo.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert chosen(repo) == (before, "HEAD~1")


def test_asked_for_base_comes_before_the_environment(repo: Repository) -> None:
    one, two, _ = (repo.commit(message) for message in ("one", "two", "three"))
    assert chosen(repo, asked="HEAD~2", env=two) == (one, "--base")
    assert chosen(repo, env=two) == (two, "GATE_BASE")


def test_unknown_asked_for_base_is_one_line(repo: Repository) -> None:
    repo.commit("one")
    with pytest.raises(GateError, match=r"^gate: --base must be a commit .*, got 'nowhere'$"):
        chosen(repo, asked="nowhere")


@pytest.mark.parametrize("gone", ["", "0" * 40, "f" * 40])
def test_commit_that_is_gone_from_the_environment_is_passed_over(
    repo: Repository, gone: str
) -> None:
    before = repo.commit("one")
    repo.commit("two")
    assert chosen(repo, env=gone) == (before, "HEAD~1")


def test_declared_changes_are_read_from_messages_since_the_base(repo: Repository) -> None:
    repo.commit("zero\n\nBenchmark-change: too::early: x")
    base = repo.git("rev-parse", "HEAD")
    repo.commit("one\n\nBenchmark-change: attention[*dtype=fp32*]: exact: and slower\nSigned: me")
    repo.commit("two\n\nBenchmark-change: no reason\n  Benchmark-change: indented: x")
    repo.commit("three\n\nBenchmark-change: bench_x.py::*:   new cases")
    assert declared_changes(repo.path, base) == {
        "attention[*dtype=fp32*]": "exact: and slower",
        "bench_x.py::*": "new cases",
    }
