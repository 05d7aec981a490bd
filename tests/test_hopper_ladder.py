"""The ladder of the Hopper kernels: what it changes, and that it changes one thing at a time."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from attention_bench import Shape
from bench_hopper_ladder import NOTHING, SHAPES, rungs

from cs336_systems.attention.hopper_launch import (
    BACKWARD,
    FORWARD,
    FOUR_GROUPS,
    THREE_GROUPS,
)


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rung_changes_one_field_to_another_value(shape: Shape, which: str) -> None:
    shipped, *changed = rungs(shape, which)
    assert shipped.changed == NOTHING
    assert changed
    for rung in changed:
        before, after = asdict(shipped.tile), asdict(rung.tile)
        if rung.changed.startswith("num_groups"):  # the other kernel
            assert rung.tile in (BACKWARD[64], THREE_GROUPS, FORWARD[64], FOUR_GROUPS)
            assert rung.tile != shipped.tile
            continue
        (field,) = (name for name in before if before[name] != after[name])
        assert rung.changed == f"{field} = {after[field]}"


def test_rungs_have_names_of_their_own() -> None:
    names = [
        str(rung)
        for shape in SHAPES
        for which in ("forward", "backward")
        for rung in rungs(shape, which)
    ]
    assert len(set(names)) == len(names)
    assert "B1-H16-S16384-D64-causal-forward-nothing" in names
