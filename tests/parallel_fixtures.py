"""What the tests of data parallelism have in common: backends, and the cases they draw."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from parallel_models import FEATURES, Case

from cs336_systems.parallel import STRATEGIES

TWO_GPUS = pytest.mark.multigpu(2)
BACKENDS = ("gloo", pytest.param("nccl", marks=TWO_GPUS))
AVERAGING = ("naive", "flat", "overlapped", "flashddp", "flashddp_ce")
ON_RANKS = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

assert set(AVERAGING) < set(STRATEGIES)

# From one bucket per parameter to one for all.
BUCKET_SIZES_MB = st.sampled_from([1e-6, 1e-4, 3e-4, 1.0, 25.0, None])

# From all gradients, some and none reduced where they lie.
IN_PLACE_MB = st.sampled_from([0, 1e-6, 3e-5, 1, None])


@st.composite
def cases(draw: st.DrawFn, world_size: int, **fixed: object) -> Case:
    """Draw a model and its training for so many ranks."""
    drawn: dict[str, Any] = {
        "seed": draw(st.integers(0, 999)),
        "widths": tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))),
        "features": draw(st.frozensets(st.sampled_from(FEATURES))),
        "double": draw(st.booleans()),
        "adamw": draw(st.booleans()),
        "num_micro_batches": draw(st.integers(1, 3)),
        "samples": tuple(
            draw(st.lists(st.integers(2, 4), min_size=world_size, max_size=world_size))
        ),
        "bucket_size_mb": draw(BUCKET_SIZES_MB),
        "in_place_mb": draw(IN_PLACE_MB),
    }
    drawn |= fixed
    if drawn["num_micro_batches"] > 1:
        # Adding to gradients that are one memory goes wrong in torch itself.
        drawn["features"] -= {"aliased"}
    return Case(**drawn)
