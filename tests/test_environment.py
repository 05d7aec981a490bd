"""Does a program find its group under torchrun and alone, and end with it?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import PROMPT_S, environment

from cs336_systems.errors import UsageError
from cs336_systems.parallel.environment import RankInfo, init_from_environment

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
CPU = torch.device("cpu")
PROGRAM = """\
import sys, torch, torch.distributed as dist
from cs336_systems.parallel.environment import init_from_environment

with init_from_environment("gloo") as info:
    total = torch.ones(2)
    dist.all_reduce(total)
    print(f"{info} {total.tolist()}\\n", end="")
    if sys.argv[1:] == ["fail"] and info.rank == 1:
        raise LookupError("nothing at 42")
    dist.barrier()
assert not dist.is_initialized()
"""


@pytest.fixture(autouse=True)
def _started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "program.py", *arguments),
        ],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_two_ranks_of_torchrun(tmp_path: Path) -> None:
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [f"{RankInfo(rank, 2, rank, CPU)} [2.0, 2.0]" for rank in range(2)]
    assert sorted(line for line in done.stdout.splitlines() if line) == expected


def test_failing_rank_of_torchrun_ends_all(tmp_path: Path) -> None:
    # Rank 0 waits in a barrier for the rank that fails.
    begin = time.monotonic()
    done = torchrun(tmp_path, "fail")
    assert done.returncode == 1
    assert "LookupError: nothing at 42" in done.stderr
    assert time.monotonic() - begin < 2 * PROMPT_S


def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with init_from_environment("gloo") as info:
        assert info == RankInfo(rank=0, world_size=1, local_rank=0, device=CPU)
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_address_of_a_store_alone_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere.invalid")
    with init_from_environment("gloo") as info:
        assert info.world_size == 1


def test_group_ends_with_an_error_of_a_single_rank() -> None:
    with pytest.raises(LookupError, match="mine"), init_from_environment("gloo"):
        raise LookupError("mine")
    assert not dist.is_initialized()


@pytest.mark.gpu
def test_alone_on_a_gpu() -> None:
    with init_from_environment() as info:
        assert info.device == torch.device("cuda", 0)
        assert dist.get_backend() == "nccl"


def test_backend_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with init_from_environment():
        assert dist.get_backend() == "gloo"


@pytest.mark.parametrize(
    ("changes", "backend", "message"),
    [
        (
            {"RANK": None, "MASTER_PORT": None},
            "gloo",
            "torchrun sets all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, "
            "got only WORLD_SIZE, LOCAL_RANK, MASTER_ADDR; missing RANK, MASTER_PORT",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "gloo", "RANK must be below WORLD_SIZE=2, got 2"),
        ({"RANK": "-1"}, "gloo", "RANK must be a number from 0 on, got '-1'"),
        ({"WORLD_SIZE": "two"}, "gloo", "WORLD_SIZE must be a number from 0 on, got 'two'"),
        ({}, "mpi", "backend must be one of gloo, nccl, got 'mpi'"),
        (
            {"LOCAL_RANK": "99"},
            "nccl",
            f"LOCAL_RANK must name one of the {torch.cuda.device_count()} CUDA devices here, "
            "counted from 0, got 99",
        ),
    ],
)
def test_wrong_variables(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], backend: str, message: str
) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        if value is not None:
            monkeypatch.setitem(os.environ, name, value)
    whole = f"^{re.escape(f'init_from_environment: {message}')}$"
    with pytest.raises(UsageError, match=whole), init_from_environment(backend):
        raise AssertionError("no group can be there")
    assert not dist.is_initialized()
