"""One benchmark file run as a command of its own: its cases, then its files of results.

Numbers are made by `pytest benchmarks/`; here is what a command adds: a place to continue from
when it was cut short, and the report in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_systems.errors import UsageError
from cs336_systems.measure.journal import finished_cases
from cs336_systems.report.experiment import write_experiment

ROOT = Path(__file__).resolve().parents[2]
# Of pytest's exit statuses these two say that every case had its turn.
_ENDED = (0, 1)
_USAGE = 4


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run, and where its files go."""

    study: str
    """The study of the report, and behind `bench_` the benchmark file."""
    options: tuple[str, ...]
    """pytest options that choose cases and say how they are run."""
    output_dir: Path
    command: str
    """What the user typed, for the stamps."""

    def run(self, machine: str) -> int:
        """Run the cases that are missing, write the files, and return the exit status.

        `machine` says what the numbers depend on besides the options: a run that was cut short on
        another one is not continued. 0: all is well; 1: a case was wrong; 2: a user's fault.
        """
        measurements = Measurements(self, machine)
        measurements.begin()
        done = [str(path) for path in measurements.parts()]
        if done:
            print(f"{self.study}: continues a run that was cut short", flush=True)
        status = _pytest(self, measurements.json_path, done)
        if status not in _ENDED:
            return 2 if status == _USAGE else status
        measurements.end()
        if not (files := measurements.files()):
            print(f"{self.study}: no case was measured", file=sys.stderr)
            return 1
        written = write_experiment(files, self.study, self.output_dir)
        print(f"{self.study}: {len(written)} files in {self.output_dir}:")
        for path in written:
            print(f"  {path.name}")
        if status:
            print(f"{self.study}: some cases were wrong and are not in these files", flush=True)
        return status


class Measurements:
    """The benchmark JSON of one choice of options, in pieces where runs were cut short.

    While a run is under way a mark lies beside them; found at the start, it says that what is
    there is to be continued, and without it that a new run replaces it.
    """

    def __init__(self, experiment: Experiment, machine: str) -> None:
        key = hashlib.sha256("\0".join([machine, *experiment.options]).encode()).hexdigest()[:12]
        self._folder = experiment.output_dir / "measurements"
        self._stem = f"{experiment.study}-{key}"
        self.json_path = self._folder / f"{self._stem}.json"
        self._journal = self._folder / f"{self._stem}.json.journal.jsonl"
        self._mark = self._folder / f"{self._stem}.unfinished"

    def begin(self) -> None:
        """Keep what an unfinished run has measured, and remove what a finished one has."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._mark.exists():
                for path in (*self.parts(), self.json_path, self._journal):
                    path.unlink(missing_ok=True)
            self._mark.touch()
            self._set_aside()
        except OSError as error:
            where = error.filename or self._folder
            raise UsageError(f"{where}: cannot be written: {error.strerror}") from error

    def _set_aside(self) -> None:
        for path in (self.json_path, self._journal):
            if _holds_cases(path):
                number = len(self.parts()) + 1
                path.rename(self._folder / f"{self._stem}.part{number}{path.suffix}")

    def parts(self) -> list[Path]:
        """Return what earlier, unfinished runs have measured."""
        return sorted(self._folder.glob(f"{self._stem}.part*"))

    def files(self) -> list[Path]:
        """Return every file that holds cases."""
        return [path for path in (*self.parts(), self.json_path) if _holds_cases(path)]

    def end(self) -> None:
        """Note that every case had its turn."""
        self._mark.unlink(missing_ok=True)


def _holds_cases(path: Path) -> bool:
    """Whether a file is there and readable; a killed run may leave an empty or a broken one."""
    try:
        return path.exists() and bool(finished_cases([path]))
    except UsageError:
        return False


def _pytest(experiment: Experiment, json_path: Path, done: Sequence[str]) -> int:
    """Run the benchmark file, its lines straight to the terminal, and return pytest's status."""
    skip = [f"--skip-done={','.join(done)}"] if done else []
    command = [
        *(sys.executable, "-m", "pytest", f"benchmarks/bench_{experiment.study}.py"),
        *("-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-quiet", "-rfE"),
        *("--no-header", f"--benchmark-json={json_path}", *skip, *experiment.options),
    ]
    # Another pytest around this one, as in a test, must not speak for it.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = [str(ROOT), str(ROOT / "cs336-basics"), *filter(None, [kept.get("PYTHONPATH")])]
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(path),
        "CS336_COMMAND": experiment.command,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def this_machine(device: str | None) -> str:
    """Return what device the cases will run on, in words that tell machines apart.

    Raises: UsageError for a device that is not there.
    """
    from cs336_systems.measure.device import device_facts, pick_device

    facts = device_facts(pick_device(device).type)
    return json.dumps({name: facts.get(name) for name in ("kind", "name", "count", "torch")})


def run_command(
    study: str,
    module: str,
    parser: argparse.ArgumentParser,
    options_of: Callable[[argparse.Namespace], list[str]],
    arguments: Sequence[str] | None,
) -> int:
    """Run a study's command line and return the exit status; a user's fault is one line and 2.

    `options_of` turns what the user has given into pytest's options.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        given = parser.parse_args(arguments)
        experiment = Experiment(
            study=study,
            options=tuple(options_of(given)),
            output_dir=given.output_dir.resolve(),
            command=shlex.join(["python", "-m", module, *arguments]),
        )
        return experiment.run(this_machine(given.device))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
