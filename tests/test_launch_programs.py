"""Do whole programs and test runs start ranks cleanly, and leave none behind?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PROMPT_S, environment, is_running, run_python, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

SCRIPT = """\
import sys
import torch.distributed as dist
from cs336_systems.parallel.launch import run_on_ranks

def double(x):
    return x * (dist.get_rank() + 1)

{guard}
    print(run_on_ranks(double, 2, 21))
"""


@pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]])
def test_functions_of_a_program_and_no_warning_on_the_way(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "program.py").write_text(SCRIPT.format(guard='if __name__ == "__main__":'))
    done = run_python("-W", "error", *arguments, folder=tmp_path)
    assert (done.stdout, done.stderr) == ("[21, 42]\n", "")


def test_program_that_would_start_itself_over_and_over_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT.format(guard="if True:"))
    done = run_python("program.py", folder=tmp_path)
    assert done.returncode == 1
    assert "UsageError: RankPool: run must be called under `if __name__" in done.stderr


def test_program_without_a_file_is_refused(tmp_path: Path) -> None:
    done = run_python("-c", SCRIPT.format(guard="if True:"), folder=tmp_path)
    assert "function must be in a module that ranks can import, got '__main__'" in done.stderr


OWNER = """\
import sys, time
import launch_cases as cases
from cs336_systems.parallel.launch import RankPool

pool = RankPool(2)
pool.run(getattr(cases, sys.argv[1]), sys.argv[2])
time.sleep(60)
"""


@pytest.mark.parametrize("work", ["write_pid", "write_pid_and_sleep"], ids=["idle", "busy"])
def test_no_rank_outlives_a_killed_parent(tmp_path: Path, work: str) -> None:
    pids, temporary = tmp_path / "pids", tmp_path / "temporary"
    pids.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-c", OWNER, work, str(pids)]
    with contextlib.ExitStack() as stack:
        parent = subprocess.Popen(command, env=environment(TMPDIR=str(temporary)))
        stack.callback(parent.wait)
        stack.callback(parent.kill)
        assert wait_until(lambda: len(list(pids.iterdir())) == 2, 60)
        started = [int(path.name) for path in pids.iterdir()]
        assert [pid for pid in started if not is_running(pid)] == []
    assert wait_until(lambda: not any(is_running(pid) for pid in started), PROMPT_S)
    assert list(temporary.iterdir()) == []


def test_two_test_runs_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_sum.py").write_text(
        "import launch_cases as cases\n"
        "from ranks import pool\n\n"
        "def test_sum():\n"
        "    for _ in range(50):\n"
        "        assert pool(2).run(cases.rank_and_sum, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    runs = [
        subprocess.Popen(
            [*command, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=100)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
