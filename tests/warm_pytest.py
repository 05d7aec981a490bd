"""Runs pytest many times for tests, each in a fork of one process that has imported torch and the
like already.

A request is a line of JSON, {"arguments", "environment", "stdout", "stderr"}; the answer is a line
with the exit status. Forks share nothing but what was imported, which is nothing of this project,
so each run is as a new process is, seconds sooner.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The assertions of plugins, which pytest would rewrite on import.
_IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `pytest ARGUMENTS` at the project's root, in this process' environment as it is now."""
    names = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        request = {
            "arguments": arguments,
            "environment": {**names, "OMP_NUM_THREADS": "1"},
            **files,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        output, errors = (Path(path).read_text() for path in files.values())
    return subprocess.CompletedProcess(["pytest", *arguments], status, output, errors)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    server.communicate()


def _serve() -> None:
    import hypothesis.strategies  # noqa: F401
    import pytest
    import pytest_benchmark.plugin  # noqa: F401
    import torch
    import torch.distributed.tensor

    assert not torch.cuda.is_initialized()  # a fork could not use the GPU
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            os.environ.clear()
            os.environ.update(request["environment"])
            _send_to(0, os.devnull, os.O_RDONLY)
            _send_to(1, request["stdout"], os.O_CREAT | os.O_WRONLY)
            _send_to(2, request["stderr"], os.O_CREAT | os.O_WRONLY)
            # As `python -m pytest` has it.
            sys.argv = ["pytest", *request["arguments"]]
            sys.path[0] = str(ROOT)
            # A plugin of what others depend on, slow to import.
            sys.exit(pytest.main(["-p", "no:anyio", "-W", _IMPORTED, *request["arguments"]]))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _send_to(descriptor: int, path: str, flags: int) -> None:
    file = os.open(path, flags)
    os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    _serve()
