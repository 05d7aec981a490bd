"""Every chosen tile compiles for GPUs that are not here, fits, and spills no more than said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cs336_systems.attention.compile_only import SHARED_BYTES, Row, Usage, misfits
from cs336_systems.attention.tiles import Tile

TILE = Tile(block_m=64, block_n=64, num_warps=4, num_stages=2)


def compile_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the module where kernels are compiled: not in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "cs336_systems.attention.compile_only"]
    return subprocess.run(
        [*command, *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_tiles_fit(architecture: int) -> None:
    """Shared memory within the architecture's, registers within 255, nothing spilled unsaid."""
    done = compile_in_a_process(
        f"--architectures={architecture}", "--dtypes=bf16", "--head-dims=64,128"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"sm_{architecture}") >= 10
    assert "backward, one pass" in done.stdout


def test_single_precision_tiles_fit() -> None:
    """For sm_100 Triton 3.6 leaves nothing of products of 64 rows in parts of bf16."""
    done = compile_in_a_process("--architectures=90,100", "--dtypes=fp32", "--head-dims=64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fp32") == 8


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        (Usage(255, 0, SHARED_BYTES[90]), None),
        (Usage(100, 0, SHARED_BYTES[90] + 1), "uses 232449 bytes of shared memory, has 232448"),
        (Usage(4, 0, 1024), "uses 4 registers: the compiler left nothing of it"),
        (Usage(255, 8, 1024), "spills 8 bytes, 0 known"),
    ],
)
def test_what_does_not_fit_is_said(usage: Usage, said: str | None) -> None:
    row = Row(90, "bf16", 64, "forward", TILE, usage)
    expected = [] if said is None else [f"sm_90 bf16 64 forward {said}"]
    assert list(misfits([row])) == expected
