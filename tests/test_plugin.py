"""The fixture inside a real pytest run: rows, JSON, journal, comparison, bad options."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

with contextlib.suppress(ImportError):
    # What a run inside a test imports first is forgotten with it, which triton does not survive.
    import triton  # noqa: F401
import torch

PLUGIN = ("-p", "cs336_systems.measure.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
CASES = """
    import torch
    from cs336_systems.measure.record import Case
    from cs336_systems.measure.workload import NotMeasured, Workload

    def case(name):
        return Case(study="study", params={"name": name}, rounds=3, warmup_rounds=1)

    def test_fine(gpu_benchmark):
        record = gpu_benchmark(case("fine"), lambda: sum(range(1000)))
        assert record.status == "ok"

    def test_oom(gpu_benchmark):
        gpu_benchmark(case("oom"), lambda: torch.empty(2**60, dtype=torch.uint8))

    def test_missing(gpu_benchmark):
        def build():
            raise NotMeasured("not_installed", "package x is not installed")
        gpu_benchmark(case("missing"), build=build)

    def test_wrong(gpu_benchmark):
        def check():
            raise AssertionError("wrong result")
        gpu_benchmark(case("wrong"), lambda: None, check=check)

    def test_fails_after_timing(gpu_benchmark):
        gpu_benchmark(case("late"), lambda: None)
        raise AssertionError("found wrong afterwards")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # Would turn measuring off.
    pytester.makepyfile(CASES)
    pytester.makeini("[pytest]\nfilterwarnings = default\n")
    return pytester


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*PLUGIN, "--device", "cpu", *args)


def result(pytester: pytest.Pytester, name: str = "out.json") -> dict[str, Any]:
    return dict(json.loads((pytester.path / name).read_text()))


def test_rows_and_json(suite: pytest.Pytester) -> None:
    outcome = run(suite, f"--benchmark-json={suite.path / 'out.json'}", "-rs")
    outcome.assert_outcomes(passed=1, skipped=2, failed=2)
    outcome.stdout.fnmatch_lines(["*study*fine*ms*3 rounds*", "*study*OOM: ran out of memory*"])
    data = result(suite)
    (timed,) = data["benchmarks"]
    assert timed["extra_info"]["case"] == {"name": "fine"}
    assert timed["group"] == "study"
    assert timed["options"]["timer"] == "wall_clock"
    assert len(timed["stats"]["data"]) == 3
    rows = {row["case"]["name"]: row for row in data["cs336_systems"]["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "oom": "oom",
        "missing": "not_installed",
    }
    assert rows["oom"]["metrics"]["requested_bytes"] == 2**60
    assert data["machine_info"]["device"]["kind"] == "cpu"
    assert "node" not in data["machine_info"]
    assert not list(suite.path.glob("*.journal.jsonl")), (
        "a run that ended normally leaves no journal"
    )


def test_interrupted_run_leaves_a_journal_that_can_be_continued(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_z="""
        import os
        def test_killed():
            os._exit(9)
        """
    )
    suite.runpytest_subprocess(*PLUGIN, "--device=cpu", "--benchmark-json=out.json")
    journal = suite.path / "out.json.journal.jsonl"
    header, *lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert header["machine_info"]["device"]["kind"] == "cpu"
    assert header["cs336_systems"]["schema"]
    assert [kind for line in lines for kind in line] == ["benchmark", "row", "row", "benchmark"]
    (suite.path / "test_z.py").unlink()
    again = run(suite, "--benchmark-json=more.json", f"--skip-done={journal.name}", "-rs")
    again.assert_outcomes(skipped=4, failed=1)
    again.stdout.fnmatch_lines(["*already measured (--skip-done)*"])


def test_interrupted_case_is_not_in_the_json(suite: pytest.Pytester) -> None:
    """Ctrl-C amid timed rounds: pytest-benchmark writes what it has, of which nobody knows what
    it is."""
    suite.makepyfile(
        test_z="""
        from test_interrupted_case_is_not_in_the_json import case

        def test_interrupted(gpu_benchmark):
            calls = []
            def step():
                calls.append(None)
                if len(calls) == 4:
                    raise KeyboardInterrupt
            gpu_benchmark(case("interrupted"), step)
        """
    )
    outcome = suite.runpytest_subprocess(*PLUGIN, "--device=cpu", "--benchmark-json=out.json")
    assert outcome.ret == pytest.ExitCode.INTERRUPTED
    found = [entry["extra_info"]["case"]["name"] for entry in result(suite)["benchmarks"]]
    assert found == ["fine"]


def test_run_without_a_time_still_has_its_rows(suite: pytest.Pytester) -> None:
    run(suite, "--benchmark-json=out.json", "-k", "oom").assert_outcomes(skipped=1)
    data = result(suite)
    assert data["benchmarks"] == []
    assert [row["status"] for row in data["cs336_systems"]["rows"]] == ["oom"]
    assert data["machine_info"]["device"]["kind"] == "cpu"


def test_disabled_and_parallel_runs_measure_nothing(suite: pytest.Pytester) -> None:
    outcome = run(suite, "--benchmark-disable", "-k", "fine")
    outcome.assert_outcomes(passed=1)


def test_benchmark_only_and_skip_see_the_fixture(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_plain="def test_plain():\n    pass\n")
    run(suite, "--benchmark-only", "-k", "fine or plain").assert_outcomes(passed=1, skipped=1)
    run(suite, "--benchmark-skip", "-k", "fine or plain").assert_outcomes(passed=1, skipped=1)


def test_fixture_takes_closure_or_build(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_bad="""
        from cs336_systems.measure.record import Case
        def test_neither(gpu_benchmark):
            gpu_benchmark(Case(study="s", params={}))
        """
    )
    outcome = run(suite, "test_bad.py")
    outcome.stdout.fnmatch_lines(["*closure or build must be given, one of the two*"])


class TestCompare:
    """pytest-benchmark's own comparison, refused between machines that differ."""

    def save(self, suite: pytest.Pytester) -> Path:
        run(suite, "-k", "fine", "--benchmark-save=base").assert_outcomes(passed=1)
        (saved,) = suite.path.glob(".benchmarks/*/*.json")
        return saved

    def test_same_machine(self, suite: pytest.Pytester) -> None:
        self.save(suite)
        outcome = run(suite, "-k", "fine", "--benchmark-compare")
        outcome.assert_outcomes(passed=1)
        outcome.stdout.fnmatch_lines_random(["*test_fine (NOW)*", "*test_fine (0001_base)*"])

    def test_slow_down_fails_when_asked(self, suite: pytest.Pytester) -> None:
        saved = self.save(suite)
        data = json.loads(saved.read_text())
        data["benchmarks"][0]["stats"]["median"] /= 1e6
        saved.write_text(json.dumps(data))
        outcome = run(
            suite, "-k", "fine", "--benchmark-compare", "--benchmark-compare-fail=median:100%"
        )
        assert outcome.ret != 0
        outcome.stderr.fnmatch_lines(["*Performance has regressed*"])

    @pytest.mark.parametrize(
        ("key", "value"), [("torch", "1.0"), ("name", "Another GPU"), ("python", "3.1.0")]
    )
    def test_other_machine_is_refused(self, suite: pytest.Pytester, key: str, value: str) -> None:
        saved = self.save(suite)
        data = json.loads(saved.read_text())
        data["machine_info"]["device"][key] = value
        saved.write_text(json.dumps(data))
        outcome = run(suite, "-k", "fine", "--benchmark-compare")
        assert outcome.ret == pytest.ExitCode.USAGE_ERROR
        outcome.stderr.fnmatch_lines(
            [f"*both runs must be on one kind of machine, got {key}: base*"]
        )

    def test_foreign_json_is_refused(self, suite: pytest.Pytester) -> None:
        saved = self.save(suite)
        data = json.loads(saved.read_text())
        del data["machine_info"]["device"]
        saved.write_text(json.dumps(data))
        outcome = run(suite, "-k", "fine", "--benchmark-compare")
        assert outcome.ret == pytest.ExitCode.USAGE_ERROR
        outcome.stderr.fnmatch_lines(["*must be a result of this suite*"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "benchmarks: --rounds must be at least 1, got 0"),
        (["--warmup-rounds=-1"], "benchmarks: --warmup-rounds must be at least 0, got -1"),
        (["--max-seconds=0"], "benchmarks: --max-seconds must be positive, got 0.0"),
        (["--skip-done=nowhere.json"], "benchmarks: --skip-done must name readable files"),
        (["--device=tpu"], "benchmarks: --device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_are_one_line(suite: pytest.Pytester, options: list[str], message: str) -> None:
    outcome = suite.runpytest_inprocess(*PLUGIN, *options)
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    outcome.stderr.fnmatch_lines([f"*{message}*"])
    assert "Traceback" not in outcome.stderr.str()


def test_asking_for_a_gpu_where_there_is_none(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = suite.runpytest_inprocess(*PLUGIN, "--device=cuda")
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    outcome.stderr.fnmatch_lines(
        ["*--device must be a device that torch finds (0 CUDA devices here)*"]
    )


def test_commit_may_come_from_the_environment(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CS336_COMMIT", "0123abc+dirty")
    run(suite, "-k", "fine", "--benchmark-json=out.json").assert_outcomes(passed=1)
    commit = result(suite)["commit_info"]
    assert (commit["id"], commit["dirty"]) == ("0123abc", True)
