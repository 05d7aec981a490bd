"""Programs that tests start, and whether their processes are still there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT_S = 10.0
"""Within this, all ranks of a failed call have ended."""


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which this checkout and its tests' modules are found."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).parent
    here = f"{tests.parent}:{tests.parent / 'cs336-basics'}:{tests}"
    return {**names, "PYTHONPATH": here, **variables}


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
