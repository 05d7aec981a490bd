"""Does the gate take turns, look twice, honour what is declared, and always clean up?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gate
import pytest
from gate import Done, Flag
from gate_base import GateError, choose_base
from git_repository import Repository

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repo")
    made.write("benchmarks/bench_x.py", "")
    made.write(".gitignore", "/out/\n")
    return made


class Fakes:
    """Records what a gate does and answers as it is told."""

    def __init__(self, *verdicts: Sequence[Flag], statuses: Mapping[str, int] | None = None):
        self.verdicts = list(verdicts)
        self.statuses = statuses or {}
        self.measured: list[tuple[str, tuple[str, ...]]] = []
        self.compared: list[tuple[list[str], list[str]]] = []
        self.allowed: Mapping[str, str] = {}

    def measure(self, tree: Path, json_path: Path, cases: Sequence[str]) -> Done:
        assert tree.is_dir()
        side = json_path.name.partition("-")[0]
        self.measured.append((side, tuple(cases)))
        if status := self.statuses.get(side):
            return Done(status, "first line\nlast line")
        json_path.write_text(json.dumps({"benchmarks": [{}, {}]}))
        return Done(0, "")

    def compare(
        self, base: Sequence[Path], head: Sequence[Path], allowed: Mapping[str, str]
    ) -> list[Flag]:
        self.compared.append(([path.name for path in base], [path.name for path in head]))
        self.allowed = allowed
        return list(self.verdicts.pop(0))

    def order(self) -> str:
        return "".join(side[0] for side, _ in self.measured)


def run_gate(repo: Repository, fakes: Fakes, repeats: int = 3) -> int:
    base = choose_base(repo.path, None, None)
    settings = {"measure": fakes.measure, "compare": fakes.compare, "repeats": repeats}
    return gate.gate(repo.path, base, **settings)


def numbered(side: str, count: int) -> list[str]:
    return [f"{side}-{number + 1}.json" for number in range(count)]


SLOW = Flag("regression", "study[n=1]", "benchmarks/bench_x.py::bench_y[1]")
COUNT = Flag("counts", "study[n=2]", "benchmarks/bench_x.py::bench_y[2]")
Said = pytest.CaptureFixture[str]


@pytest.fixture
def two_commits(repo: Repository) -> Repository:
    repo.commit("one")
    repo.commit("two\n\nBenchmark-change: study[*]: meant")
    return repo


def test_turns_alternate_and_the_gate_passes(two_commits: Repository, capsys: Said) -> None:
    fakes = Fakes([])
    assert run_gate(two_commits, fakes) == 0
    assert fakes.order() == "bhhbbh"
    assert fakes.compared == [(numbered("base", 3), numbered("head", 3))]
    assert fakes.allowed == {"study[*]": "meant"}
    said = capsys.readouterr().out.splitlines()
    assert "gate: declared: study[*]: meant" in said
    short = two_commits.git("rev-parse", "HEAD~1")[:12]
    assert said[-1] == f"gate: passed (2 cases, base {short})"


def test_slower_case_is_measured_again_and_pooled(two_commits: Repository, capsys: Said) -> None:
    fakes = Fakes([SLOW, SLOW], [])
    assert run_gate(two_commits, fakes, repeats=2) == 0
    assert fakes.order() == "bhhb" * 2
    assert [cases for _, cases in fakes.measured] == [()] * 4 + [(SLOW.fullname,)] * 4
    assert fakes.compared[1] == (numbered("base", 4), numbered("head", 4))
    assert "gate: passed" in capsys.readouterr().out.splitlines()[-1]


def test_a_second_look_may_be_as_unlucky_as_the_first(two_commits: Repository) -> None:
    fakes = Fakes([SLOW], [SLOW], [])
    assert run_gate(two_commits, fakes, repeats=1) == 0
    assert fakes.order() == "bh" * 3


def test_case_that_stays_slower_fails(two_commits: Repository, capsys: Said) -> None:
    fakes = Fakes(*[[SLOW, COUNT]] * 3)
    assert run_gate(two_commits, fakes, repeats=1) == 1
    assert fakes.order() == "bh" * 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("gate: FAILED")
    assert last.endswith("study[n=1] (regression), study[n=2] (counts)")


def test_counts_need_no_second_look(two_commits: Repository) -> None:
    fakes = Fakes([COUNT])
    assert run_gate(two_commits, fakes, repeats=1) == 1
    assert fakes.order() == "bh"


@pytest.mark.parametrize("status", [2, 4, 5])
def test_base_that_cannot_be_measured_passes(
    two_commits: Repository, status: int, capsys: Said
) -> None:
    fakes = Fakes(statuses={"base": status})
    assert run_gate(two_commits, fakes) == 0
    assert fakes.order() == "b"
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"gate: base \w{12} cannot be measured \(.+\): nothing to gate", last)


@pytest.mark.parametrize("status", [1, 3])
def test_broken_base_does_not_keep_out_a_head_that_runs(
    two_commits: Repository, status: int, capsys: Said
) -> None:
    fakes = Fakes(statuses={"base": status})
    assert run_gate(two_commits, fakes) == 0
    assert fakes.order() == "bh"
    said = capsys.readouterr().out
    assert "last line" in said, "the base's own words are shown"
    assert f"(its run ended with status {status}, HEAD's passed): nothing to gate" in said


def test_base_and_head_that_both_fail_are_an_error(two_commits: Repository) -> None:
    with pytest.raises(GateError, match="gate: measuring head ended with status 1"):
        run_gate(two_commits, Fakes(statuses={"base": 1, "head": 1}))


def test_base_without_benchmarks_is_not_run(tmp_path: Path, capsys: Said) -> None:
    repo = Repository(tmp_path / "repo")
    repo.commit("one")
    repo.commit("two")
    fakes = Fakes()
    assert run_gate(repo, fakes) == 0
    assert fakes.order() == ""
    assert "(it has no benchmarks/)" in capsys.readouterr().out


@pytest.mark.parametrize(("side", "status"), [("head", 1), ("head", 4), ("head", 5)])
def test_other_failures_are_errors_with_the_tail(
    two_commits: Repository, side: str, status: int
) -> None:
    message = rf"gate: measuring {side} ended with status {status}\n(.*\n)*last line"
    with pytest.raises(GateError, match=message):
        run_gate(two_commits, Fakes(statuses={side: status}))
    assert two_commits.num_worktrees() == 1


def test_empty_json_is_an_error(two_commits: Repository) -> None:
    fakes = Fakes()

    def measure(tree: Path, json_path: Path, cases: Sequence[str]) -> Done:
        json_path.touch()
        return Done(0, "")

    fakes.measure = measure  # type: ignore[method-assign]
    with pytest.raises(GateError, match="base wrote no measurements"):
        run_gate(two_commits, fakes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), RuntimeError])
def test_worktree_is_gone_whatever_happens(
    two_commits: Repository, error: type[BaseException]
) -> None:
    fakes, seen = Fakes(), []

    def measure(tree: Path, json_path: Path, cases: Sequence[str]) -> Done:
        seen.append((tree, two_commits.num_worktrees()))
        raise error

    fakes.measure = measure  # type: ignore[method-assign]
    with pytest.raises(error if isinstance(error, type) else SystemExit):
        run_gate(two_commits, fakes)
    [(tree, num_worktrees)] = seen
    assert num_worktrees == 2
    assert not tree.parent.exists()
    assert two_commits.num_worktrees() == 1


# --- the script itself, with a stand-in for the report ---

# Stands in for pytest-benchmark, which spends seconds on describing the machine.
CONFTEST = """
from pathlib import Path

def pytest_addoption(parser):
    parser.addoption("--gate", action="store_true")
    parser.addoption("--rounds", type=int)
    parser.addoption("--benchmark-json")

def pytest_sessionfinish(session):
    Path(session.config.getoption("benchmark_json")).write_text('{"benchmarks": [{}]}')
"""
BENCH = """
import os, time
from pathlib import Path

def bench_y(request):
    assert request.config.getoption("gate") and os.environ["PYTHONHASHSEED"] == "0"
    with Path(r"%s").open("a") as calls:
        print(os.getpid(), os.getcwd(), file=calls, flush=True)
    %s
"""
REPORT = """
import json, sys
from pathlib import Path

assert sys.argv[1] == "compare"
base, head = (side.split(",") for side in sys.argv[2:4])
assert all(json.loads(Path(path).read_text())["benchmarks"] for path in [*base, *head])
print("compared", len(base), "with", len(head), *sys.argv[4:-2])
slow = {"case": "y", "fullname": "benchmarks/bench_x.py::bench_y", "failed": True}
slow["failures"] = [{"kind": "regression", "detail": ""}]
outcomes = [slow] if len(base) < 2 else []
Path(sys.argv[-1]).write_text(json.dumps({"outcomes": outcomes}))
sys.exit(bool(outcomes))
"""

MakeProject = Callable[[str], Repository]


@pytest.fixture
def make_project(repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeProject:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("GATE_BASE", raising=False)

    def make(body: str) -> Repository:
        for name in ("gate.py", "gate_base.py"):
            repo.write(f"scripts/{name}", (ROOT / "scripts" / name).read_text())
        # Without these an installed package of the same name would come first.
        repo.write("cs336_systems/__init__.py", "")
        repo.write("cs336_systems/report/__init__.py", "")
        repo.write("cs336_systems/report/__main__.py", REPORT)
        repo.write("pytest.ini", "[pytest]\npython_files = bench_*\npython_functions = bench_*\n")
        repo.write("benchmarks/conftest.py", CONFTEST)
        repo.write("benchmarks/bench_x.py", BENCH % (tmp_path / "calls", body))
        repo.commit("one")
        repo.commit("two\n\nBenchmark-change: z[*a=1]: wanted")
        return repo

    return make


def script(repo: Repository, *arguments: str) -> list[str]:
    return [sys.executable, str(repo.path / "scripts/gate.py"), *arguments]


def test_whole_script(make_project: MakeProject, tmp_path: Path) -> None:
    repo = make_project("pass")
    done = subprocess.run(script(repo, "--repeats", "1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "compared 1 with 1 --allow z[*a=1]=wanted" in said
    assert "compared 2 with 2 --allow z[*a=1]=wanted" in said
    assert said[-1].startswith("gate: passed (1 cases, base ")
    trees = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [tree == str(repo.path) for tree in trees] == [False, True, False, True]
    assert repo.num_worktrees() == 1


def test_whole_script_reports_a_broken_head(make_project: MakeProject) -> None:
    repo = make_project("pass")
    repo.write("benchmarks/bench_x.py", "raise RuntimeError('broken here')")
    done = subprocess.run(script(repo), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gate: measuring head ended with status 2")
    assert "broken here" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_benchmark_and_removes_the_worktree(
    make_project: MakeProject, tmp_path: Path, number: signal.Signals
) -> None:
    repo = make_project("time.sleep(60)")
    running = subprocess.Popen(script(repo), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    calls, deadline = tmp_path / "calls", time.monotonic() + 30
    while not calls.exists() or not calls.read_text():
        assert time.monotonic() < deadline, "the benchmark never began"
        time.sleep(0.05)
    assert repo.num_worktrees() == 2
    running.send_signal(number)
    assert running.wait(30) in (128 + number, -number)
    assert repo.num_worktrees() == 1
    assert not list((repo.path / ".git").glob("worktrees/*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(calls.read_text().split()[0]), 0)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/gate.py", "--repeats", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--repeats must be at least 1, got 0" in done.stderr
