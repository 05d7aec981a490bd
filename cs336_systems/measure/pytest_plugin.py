"""The `gpu_benchmark` fixture, its options, and the pytest-benchmark hooks that put records into
the JSON.

Loaded by the repository's conftest.py, or anywhere with `-p cs336_systems.measure.pytest_plugin`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cs336_systems.errors import UsageError, bad
from cs336_systems.measure.device import commit_facts, device_facts, pick_device
from cs336_systems.measure.harness import Clock, Harness, Settings
from cs336_systems.measure.journal import Journal, finished_cases
from cs336_systems.measure.memory import gib
from cs336_systems.measure.record import SCHEMA, Case, Record
from cs336_systems.measure.workload import Workload

FIXTURE = "gpu_benchmark"
_DEFAULTS = {"cuda": {"rounds": 10, "max_seconds": 30.0}, "cpu": {"rounds": 5, "max_seconds": 3.0}}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cs336-systems", "measuring (cs336-systems)")
    group.addoption("--device", help="cpu or cuda; default: the GPU when there is one")
    group.addoption(
        "--rounds", type=int, help="timed rounds a case; default: 10 on a GPU, 5 on a CPU"
    )
    group.addoption(
        "--warmup-rounds", type=int, help="untimed rounds before them; default: 5, or 2"
    )
    group.addoption(
        "--max-seconds",
        type=float,
        help="stop adding timed rounds to a case beyond this (never below 3); default: 30, or 3",
    )
    group.addoption(
        "--skip-done",
        metavar="FILE[,FILE]",
        help="skip the cases that these JSON files or journals hold: continues an interrupted run",
    )
    group.addoption(
        "--nvtx", action="store_true", help="mark warm-up, passes and attention with NVTX ranges"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Registered before pytest-benchmark loads what it compares with, which asks for the machine.
    try:
        config.pluginmanager.register(Session(config), "cs336-session")
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FIXTURE in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CaseClock()))


@pytest.fixture
def gpu_benchmark(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[GpuBenchmark]:
    """Measure one case: `gpu_benchmark(case, closure)` or `gpu_benchmark(case, build=function)`."""
    session = session_of(request.config)
    marker = request.node.get_closest_marker("benchmark")
    yield GpuBenchmark(session, benchmark, marker.kwargs["timer"], request.node.nodeid)
    if benchmark.stats is None:
        benchmark.skipped = (
            True  # Keeps pytest-benchmark from warning that the fixture went unused.
        )


def session_of(config: pytest.Config) -> Session:
    """Return this run's measuring session."""
    session = config.pluginmanager.get_plugin("cs336-session")
    assert isinstance(session, Session)
    return session


class CaseClock:
    """The timer pytest-benchmark is given before the case has said which clock it wants."""

    def __init__(self) -> None:
        self.clock: Clock = time.perf_counter

    @property
    def __name__(self) -> str:
        return str(getattr(self.clock, "__name__", "clock"))

    def __call__(self) -> float:
        return self.clock()


class GpuBenchmark:
    """The fixture's value; one case a test."""

    def __init__(
        self, session: Session, benchmark: Any, case_clock: CaseClock, fullname: str
    ) -> None:
        self._session = session
        self._benchmark = benchmark
        self._case_clock = case_clock
        self._fullname = fullname
        self.harness = Harness(session.settings)

    def __call__(
        self,
        case: Case,
        closure: Callable[[], object] | None = None,
        *,
        build: Callable[[], Workload] | None = None,
        setup: Callable[[], object] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Record:
        """Time `closure`, or the workload that `build` prepares; return the record.

        `build` runs inside the guard that turns running out of memory into a row, so large
        allocations belong there. `setup` runs before every round, `check` once before the first,
        both untimed.

        Raises: pytest's skip when the case ended without a time, with the row's reason.
        """
        if (closure is None) == (build is None):
            raise bad(
                "gpu_benchmark", "closure or build", "be given, one of the two", (closure, build)
            )
        if self._fullname in self._session.done:
            pytest.skip("already measured (--skip-done)")
        if build is None:
            assert closure is not None
            workload = Workload(step=closure, setup=setup, check=check)
            record = self.harness.run(case, lambda: workload, self._timer)
        else:
            record = self.harness.run(case, build, self._timer)
        self._keep(record)
        return record

    def _timer(
        self, clock: Clock, step: Callable[..., Any], setup: Callable[..., Any] | None, rounds: int
    ) -> None:
        self._case_clock.clock = clock
        self._benchmark.pedantic(step, setup=setup, rounds=rounds, iterations=1)

    def _keep(self, record: Record) -> None:
        self._benchmark.group = record.case.study
        if record.status != "ok":
            self._session.add_row(self._fullname, record)
            pytest.skip(f"{record.status.replace('_', ' ')}: {record.reason}")
        self._benchmark.extra_info.update(record.to_json())
        if self._benchmark.stats is not None:  # None: timing is disabled in this run.
            self._benchmark.stats.group = record.case.study
            self._session.add_timed(self._benchmark.stats, record)


class Session:
    """State of one run: settings, finished rows, the journal, and the hooks that write them out."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._started = time.time()
        self._rows: list[dict[str, Any]] = []
        self._failed: set[str] = set()
        self._measured: set[str] = set()
        self._position = 0
        self._total = 0
        self._line: str | None = None
        self._journal: Journal | None = None
        self._composed = False
        self.settings = _settings(config)
        skip_done = config.getoption("skip_done")
        self.done = finished_cases(map(Path, skip_done.split(","))) if skip_done else set()

    def add_timed(self, stats: Any, record: Record) -> None:
        """Journal a timed case and print its line."""
        self._write("benchmark", stats.as_dict(include_data=True))
        unit = 1e3
        line = (
            f"{stats.stats.median * unit:10.3f} ms ± {stats.stats.stddev * unit:.3f}"
            f"  ({stats.stats.rounds} rounds, {record.case.clock.removesuffix('_ms')} clock)"
        )
        if peak := record.metrics.get("peak_bytes"):
            line += f"  peak {gib(peak)}"
        self._announce(record, line)

    def add_row(self, fullname: str, record: Record) -> None:
        """Keep a case that was not timed, journal it and print its line."""
        row = {**record.to_json(), "fullname": fullname}
        self._rows.append(row)
        self._write("row", row)
        self._announce(record, f"{record.status.replace('_', ' ').upper()}: {record.reason}")

    def _write(self, kind: str, entry: dict[str, Any]) -> None:
        path = self._json_path()
        if path is None:
            return
        if self._journal is None:
            hook = self._config.hook
            machine = hook.pytest_benchmark_generate_machine_info(config=self._config)
            self.pytest_benchmark_update_machine_info(machine)
            commit = hook.pytest_benchmark_generate_commit_info(config=self._config)
            self.pytest_benchmark_update_commit_info(commit)
            header = {
                "machine_info": machine,
                "commit_info": commit,
                "cs336_systems": self._section(),
            }
            self._journal = Journal(path, header)
        self._journal.append(kind, entry)

    def _announce(self, record: Record, line: str) -> None:
        self._position += 1
        values = " ".join(str(value) for value in record.case.params.values())
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.time() - self._started))
        position = f"[{self._position:>4}/{self._total} {elapsed}]"
        self._line = f"{position} {record.case.study:<15} {values:<42} {line}"

    def _section(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "run": {
                "command": _command(),
                "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self._started, 1),
            },
            "rows": [row for row in self._rows if row["fullname"] not in self._failed],
        }

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._measured = {
            item.nodeid for item in session.items if FIXTURE in getattr(item, "fixturenames", ())
        }
        self._total = len(self._measured)
        if self._total == len(session.items) and (reporter := self._reporter()) is not None:
            reporter.showfspath = False  # Every case prints a line of its own.

    def _reporter(self) -> Any:
        return self._config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self) -> None:
        """Print the finished case's line here, where pytest is not capturing what is written."""
        reporter = self._reporter()
        if self._line is not None and reporter is not None and reporter.verbosity >= 0:
            reporter.ensure_newline()
            reporter.write_line(self._line)
        self._line = None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        outcome: Any = yield
        report = outcome.get_result()
        if FIXTURE in getattr(item, "fixturenames", ()):
            report.cs336_measured = True
            if report.failed:
                self._failed.add(item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any, config: pytest.Config) -> Any:
        # A measured case has printed a line of its own; a dot between the lines would be noise.
        if getattr(report, "cs336_measured", False) and not report.failed:
            counted = report.when == "call" or report.skipped
            return (report.outcome, "", report.outcome.upper()) if counted else ("", "", "")
        return None

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        machine_info.pop("node", None)
        cpu = machine_info.get("cpu", {})
        machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "arch", "count")}
        machine_info["device"] = device_facts(self.settings.device.type)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_commit_info(self, commit_info: dict[str, Any]) -> None:
        # A copy of the tree, with no history or another's, is told its commit by the environment.
        facts: dict[str, Any] | None
        if commit := os.environ.get("CS336_COMMIT"):
            commit_info.clear()
            facts = {"id": commit.removesuffix("+dirty"), "dirty": commit.endswith("+dirty")}
        else:
            facts = commit_facts(self._config.rootpath)
        commit_info.pop("error", None)
        commit_info.update(facts or {})

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["benchmarks"] = [
            entry for entry in output_json["benchmarks"] if self._is_whole(entry)
        ]
        output_json["cs336_systems"] = self._section()
        self._composed = True

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Tell whether a case did not fail and, if it is one of ours, was not interrupted: its
        rounds so far are there then, but no record of what they are of."""
        name = entry["fullname"]
        is_recorded = name not in self._measured or "schema" in entry["extra_info"]
        return name not in self._failed and is_recorded

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        other = compared_benchmark.get("machine_info", {}).get("device")
        if other is None:
            raise pytest.UsageError(
                "--benchmark-compare: the earlier run must be a result of this suite, "
                "got a JSON without machine_info.device"
            )
        differences = machine_differences(other, machine_info["device"])
        if differences:
            raise pytest.UsageError(
                f"--benchmark-compare: both runs must be on one kind of machine, got "
                f"{'; '.join(differences)}"
            )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = self._json_path()
        if self._journal is None or path is None:
            return
        if not self._composed:  # Nothing was timed, so pytest-benchmark wrote nothing.
            rows_only = {**self._journal.header, "benchmarks": []}
            rows_only["cs336_systems"] = self._section()
            path.write_text(json.dumps(rows_only, default=str, indent=4))
        if path.stat().st_size:
            self._journal.remove()

    def _json_path(self) -> Path | None:
        output = self._config.getoption("benchmark_json", None)
        if output is None or isinstance(output, (str, os.PathLike)):
            return None if output is None else Path(output)
        return Path(output.name)  # pytest-benchmark 5.2 opens the file as it reads the option.


def machine_differences(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """Name what makes times of two machines incomparable: `torch: base 2.11.0, head 2.12.0`."""
    differences = []
    for key in ("kind", "name", "torch", "triton", "cuda", "python"):
        old, new = base.get(key), head.get(key)
        if key == "python":
            old, new = (".".join(str(version).split(".")[:2]) for version in (old, new))
        if old != new:
            differences.append(f"{key}: base {old}, head {new}")
    return differences


def _settings(config: pytest.Config) -> Settings:
    device = pick_device(config.getoption("device"))
    defaults = _DEFAULTS[device.type]
    rounds = config.getoption("rounds")
    warmup_rounds = config.getoption("warmup_rounds")
    max_seconds = config.getoption("max_seconds")
    if rounds is not None and rounds < 1:
        raise bad("benchmarks", "--rounds", "be at least 1", rounds)
    if warmup_rounds is not None and warmup_rounds < 0:
        raise bad("benchmarks", "--warmup-rounds", "be at least 0", warmup_rounds)
    if max_seconds is not None and max_seconds <= 0:
        raise bad("benchmarks", "--max-seconds", "be positive", max_seconds)
    return Settings(
        device=device,
        rounds=int(rounds or defaults["rounds"]),
        warmup_rounds=(5 if device.type == "cuda" else 2)
        if warmup_rounds is None
        else warmup_rounds,
        max_seconds=max_seconds or defaults["max_seconds"],
    )


def _command() -> str:
    # A program that runs the suite says what its user typed.
    if command := os.environ.get("CS336_COMMAND"):
        return command
    arguments = [
        argument for argument in sys.argv[1:] if not argument.startswith("--benchmark-json")
    ]
    return shlex.join(["pytest", *arguments])
