"""Whenever training is killed, what is resumed ends with the weights of an unbroken run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import training_kills
from processes import run_python

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize(("world_size", "num_kills"), [(1, 6), (2, 3)])
def test_training_that_is_killed_at_random(world_size: int, num_kills: int, tmp_path: Path) -> None:
    """A few moments; the program takes more of them and another seed."""
    program = training_kills.__file__
    done = run_python(program, str(tmp_path), str(num_kills), str(world_size), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *kills, summary = done.stdout.splitlines()
    assert len(kills) == num_kills
    assert re.fullmatch(
        rf"{num_kills} kills, \d+ of them while a checkpoint was written: "
        r"all \d+ runs ended with the weights of an unbroken run",
        summary,
    )
