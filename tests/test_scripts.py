"""Do the scripts pass arguments on intact, go on after failures, and say what came of it?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from shell_sandbox import ROOT, SCRIPTS, SOURCED, Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize("path", [*SCRIPTS, *SOURCED])
def test_syntax(path: str) -> None:
    subprocess.run(["bash", "-n", ROOT / path], check=True)


@pytest.mark.parametrize("path", SCRIPTS)
def test_is_executable(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    ("script", "names"),
    [
        (
            "run_benchmarks.sh",
            ["CS336_PYTHON", "PYTHON=", "out/report", "reports/", "pytest benchmarks/ --help"],
        ),
        (
            "test_and_make_submission.sh",
            ["CS336_PYTHON", "PYTHON=", "test_results.xml", "cs336-systems-submission.zip"],
        ),
    ],
)
def test_help_needs_no_python(sandbox: Sandbox, script: str, names: list[str], flag: str) -> None:
    done = sandbox.run(str(sandbox.root / script), "-k", "x", flag)
    assert done.returncode == 0
    assert [name for name in names if name not in done.stdout] == []
    assert sandbox.calls() == []


# --- running ---

RESULTS = ["--junitxml=test_results.xml", "--benchmark-disable"]
AWKWARD = ["-k", "a b and not 'c'", '--x="y" $HOME `z`', "*", ""]


def run_script(
    box: Sandbox, script: str, *arguments: str, **fakes: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    python = box.add_python("given")
    done = box.run(str(box.root / script), *arguments, CS336_PYTHON=str(python), **fakes)
    return done, [call[1:] for call in box.calls()]


def test_benchmarks_then_report(sandbox: Sandbox) -> None:
    done, calls = run_script(sandbox, "run_benchmarks.sh", *AWKWARD, FAKE_JSON="{}")
    assert done.returncode == 0, done.stderr
    pytest_call, report_call = calls
    json_option = pytest_call[5]
    path = json_option.partition("=")[2]
    assert path.startswith("out/benchmarks-2")
    assert pytest_call == [
        *("-m", "pytest", "benchmarks/", "-p", "no:xdist"),
        *(f"--benchmark-json={path}", *AWKWARD),
    ]
    assert report_call == ["-m", "cs336_systems.report", path, "--out", "out/report"]
    assert [word for word in (path, "out/report", "reports/") if word not in done.stdout] == []


def test_own_json_and_own_target_are_respected(sandbox: Sandbox) -> None:
    arguments = ["benchmarks/bench_x.py::bench_y[a b]", "--benchmark-json=deep/er/a b.json"]
    _, calls = run_script(sandbox, "run_benchmarks.sh", *arguments, FAKE_JSON="{}")
    assert calls[0] == ["-m", "pytest", "-p", "no:xdist", *arguments]
    assert calls[1][2] == "deep/er/a b.json"


@pytest.mark.parametrize(
    ("fakes", "status", "reported"),
    [
        ({"FAKE_JSON": "{}", "FAKE_STATUS_pytest": "1"}, 1, True),
        ({"FAKE_JSON": "{}", "FAKE_STATUS_pytest": "2", "FAKE_STATUS_cs336_systems": "3"}, 2, True),
        ({"FAKE_JSON": "{}", "FAKE_STATUS_cs336_systems": "3"}, 3, True),
        ({"FAKE_JSON": "", "FAKE_STATUS_pytest": "5"}, 5, False),
        ({"FAKE_STATUS_pytest": "4"}, 4, False),
    ],
)
def test_failed_benchmarks_are_reported_all_the_same(
    sandbox: Sandbox, fakes: Mapping[str, str], status: int, reported: bool
) -> None:
    done, calls = run_script(sandbox, "run_benchmarks.sh", **fakes)
    assert done.returncode == status
    assert (len(calls) == 2) == reported
    assert ("no measurements were written" in done.stderr) != reported


def test_json_of_an_earlier_run_is_not_reported_as_new(sandbox: Sandbox) -> None:
    (sandbox.root / "mine.json").write_text("{}")
    option = "--benchmark-json=mine.json"
    done, calls = run_script(sandbox, "run_benchmarks.sh", option, FAKE_STATUS_pytest="4")
    assert (done.returncode, len(calls)) == (4, 1)
    assert (sandbox.root / "mine.json").read_text() == "{}"
    assert not list((sandbox.root / "out").iterdir())


@pytest.mark.parametrize("left_by", ["this run", "an earlier run"])
def test_journal_of_an_interrupted_run_is_mentioned(sandbox: Sandbox, left_by: str) -> None:
    path = "elsewhere/a.json" if left_by == "this run" else "out/earlier.json"
    journal = sandbox.root / f"{path}.journal.jsonl"
    journal.parent.mkdir()
    journal.write_text("{}\n")
    (sandbox.root / "out").mkdir(exist_ok=True)
    (sandbox.root / "out/empty.json.journal.jsonl").touch()
    done, _ = run_script(sandbox, "run_benchmarks.sh", "--benchmark-json=elsewhere/a.json")
    assert done.stdout.count("interrupted:") == 1
    assert f"cs336_systems.report {path}.journal.jsonl --out" in done.stdout
    assert f"--skip-done={path}.journal.jsonl" in done.stdout


def test_tests_then_packing(sandbox: Sandbox) -> None:
    (sandbox.root / "test_results.xml").write_text("stale")
    done, calls = run_script(sandbox, "test_and_make_submission.sh", *AWKWARD)
    assert done.returncode == 0, done.stderr
    workers = ["-n", "2", "--dist", "loadgroup"]
    assert calls == [
        ["-m", "pytest", "tests/", *RESULTS, *workers, *AWKWARD],
        ["scripts/make_submission.py"],
    ]
    assert not (sandbox.root / "test_results.xml").exists()


@pytest.mark.parametrize("choice", [["-n", "0"], ["-n4"], ["-p", "no:xdist"], ["--dist=load"]])
def test_own_choice_of_workers_is_respected(sandbox: Sandbox, choice: list[str]) -> None:
    target = "tests/test_x.py"
    _, calls = run_script(sandbox, "test_and_make_submission.sh", *choice, target)
    assert calls[0] == ["-m", "pytest", *RESULTS, *choice, target]


def test_failing_tests_are_packed_and_fail(sandbox: Sandbox) -> None:
    done, calls = run_script(sandbox, "test_and_make_submission.sh", FAKE_STATUS_pytest="1")
    assert done.returncode == 1
    assert calls[-1] == ["scripts/make_submission.py"]
    assert "FAILED: pytest ended with status 1" in done.stderr
    assert "packed all the same" in done.stderr


@pytest.mark.parametrize(("pytest_status", "status"), [("0", 7), ("1", 1)])
def test_failing_packing_fails(sandbox: Sandbox, pytest_status: str, status: int) -> None:
    fakes = {"FAKE_STATUS_pytest": pytest_status, "FAKE_STATUS_make_submission": "7"}
    done, _ = run_script(sandbox, "test_and_make_submission.sh", **fakes)
    assert done.returncode == status
    assert "packed all the same" not in done.stderr


# --- .ci/run ---

SUMMARY = "===== 12 passed, 1 skipped in 3.21s ====="
SKIP = "SKIPPED [1] tests/test_x.py:3: needs a CUDA device, found none"


def test_ci_ends_with_the_tests_own_words(sandbox: Sandbox) -> None:
    fakes = {"FAKE_PYTEST_SAYS": f"{SKIP}\n{SUMMARY}", "FAKE_JSON": "{}"}
    done, calls = run_script(sandbox, ".ci/run", **fakes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [SKIP, SUMMARY]
    assert [" ".join(call[:3]) for call in calls] == [
        "-m ruff check",
        "-m ruff format",
        "-m mypy",
        "-m pytest tests/",
        "scripts/make_submission.py",
        "-m pytest benchmarks/",
        "-m cs336_systems.report out/ci-smoke.json",
        "-m cs336_systems.report out/ci-smoke.json",
        "scripts/gate.py",
    ]


@pytest.mark.parametrize(
    ("module", "step", "num_calls"),
    [("ruff", "lint", 1), ("mypy", "types", 3), ("pytest", "tests", 5), ("gate", "gate", 9)],
)
def test_ci_stops_at_the_first_failure(
    sandbox: Sandbox, module: str, step: str, num_calls: int
) -> None:
    fakes = {f"FAKE_STATUS_{module}": "1", "FAKE_PYTEST_SAYS": SUMMARY, "FAKE_JSON": "{}"}
    done, calls = run_script(sandbox, ".ci/run", **fakes)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(f"ci: FAILED at [{step}] with status 1")
    assert len(calls) == num_calls


def test_ci_without_a_tests_summary_fails(sandbox: Sandbox) -> None:
    done, _ = run_script(sandbox, ".ci/run", FAKE_JSON="{}")
    assert done.returncode != 0
    assert "ci: FAILED at [closing]" in done.stdout
