"""Does zero1 train as one process does, with nobody reading a parameter before it has arrived?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zero1_ranks as on_rank
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import pool
from torch.testing import assert_close
from zero1_ranks import MODELS, Case

from cs336_systems.errors import UsageError
from cs336_systems.parallel import STRATEGIES, wrap

BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.multigpu(2)])]
# Sums over ranks and micro-batches are taken in another order than in one process; in fp64 that is
# some ulps per step.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def distributed(test: Any) -> Any:
    """Mark a test that starts ranks, which one process does for all of them."""
    return pytest.mark.distributed(pytest.mark.xdist_group("ranks")(test))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        model=draw(st.sampled_from(["mlp", "tied", "reader", "normed"])),
        optimizer=draw(st.sampled_from(sorted(on_rank.OPTIMIZERS))),
        num_micro_batches=draw(st.integers(1, 3)),
        max_norm=draw(st.sampled_from([None, 0.01, 1e3])),
        scheduled=draw(st.booleans()),
        bucket_size_mb=draw(st.sampled_from([None, 25, 1e-4])),
        overlap=draw(st.booleans()),
        lazy=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@distributed
@given(cases(), st.integers(1, 3))
@example(Case(num_micro_batches=3, max_norm=0.01, scheduled=True, lazy=True), 2)
def test_equals_one_process_on_the_whole_batch(case: Case, world_size: int) -> None:
    check_case(case, world_size)


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_no_module_reads_a_parameter_too_early(model: str, backend: str) -> None:
    case = Case(model=model, lazy=backend == "gloo", max_norm=0.05, num_micro_batches=2)
    check_case(case, 2, backend)


@distributed
@pytest.mark.parametrize("options", [{"compile_whole": True}, {"compile_after": 1}])
def test_what_is_compiled_later_waits(options: dict[str, Any]) -> None:
    check_case(Case(lazy=True, **options), 2)


def check_case(case: Case, world_size: int, backend: str = "gloo") -> list[dict[str, Any]]:
    state, norms = on_rank.single(case, world_size * case.num_micro_batches)
    results = pool(world_size, backend).run(on_rank.train, case)
    # torch's weight norm computes norms of doubles in fp32 on a GPU.
    rounded = backend == "nccl" and case.model == "normed"
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if rounded else TOLERANCE
    for result in results:
        assert result["optimizer"] == "ShardedOptimizer"
        assert_close(result["state"], results[0]["state"], rtol=0, atol=0)
        assert_close(result["state"], state, **tolerance)
        assert_close(result["norms"], norms, **tolerance)
        assert result["pending_steps"] == (case.num_steps if case.overlap else 0)
    if case.max_norm == 0.01:
        assert min(norms) > case.max_norm
    return results


ACCESSES = [
    "state_dict",
    "full_state_dict",
    "module_state_dict",
    "part_state_dict",
    "parameters",
    "deepcopy",
    "pickle",
    "thrown_away",
    "second_optimizer",
    "wait",
]


@distributed
@pytest.mark.parametrize("kind", ACCESSES)
def test_access_right_after_a_step_waits(kind: str) -> None:
    results = pool(2).run(on_rank.accesses_after_step, kind)
    assert all(result["is_right"] for result in results)
    # Both own something, so both have read too early before.
    assert all(result["was_early"] for result in results)


@distributed
def test_loading_right_after_a_step_is_not_overwritten() -> None:
    assert pool(2).run(on_rank.load_after_step) == [True, True]


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_wait_for_no_more_than_their_own(backend: str) -> None:
    for counts in pool(2, backend).run(on_rank.layers_waited_for):
        # Six parameters, of which each linear layer takes two, with a ReLU after the first two.
        assert counts == [4, 4, 2, 2, 0]


@distributed
def test_a_step_is_that_of_flashddp_and_one_message_per_owner() -> None:
    flashddp = pool(2).run(on_rank.collectives_of_step, "flashddp")[0]
    for names in pool(2).run(on_rank.collectives_of_step, "zero1"):
        assert names == [*flashddp, "broadcast", "broadcast"]


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_language_model_trains_as_with_flashddp(backend: str) -> None:
    ranks = pool(2, backend)
    whole = ranks.run(on_rank.train_language_model, "flashddp", 5)
    parts = ranks.run(on_rank.train_language_model, "zero1", 5)
    for result in parts:
        assert_close(result["state"], whole[0]["state"], rtol=0, atol=0)
    total = whole[0]["state_bytes"]
    assert sum(result["state_bytes"] for result in parts) == total
    assert all(0.45 * total < result["state_bytes"] < 0.55 * total for result in parts)


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_torch_zero_is_the_same_training(optimizer: str, backend: str) -> None:
    case = Case(optimizer=optimizer, num_micro_batches=2, max_norm=0.01)
    ours = check_case(case, 2, backend)
    theirs = pool(2, backend).run(on_rank.train, replace(case, strategy="torch_zero"))
    assert [result["optimizer"] for result in theirs] == ["ZeroRedundancyOptimizer"] * 2
    for result in theirs:
        assert_close(result["state"], ours[0]["state"], **TOLERANCE)


def test_rows_and_their_options() -> None:
    assert not STRATEGIES["zero1"].peer
    assert STRATEGIES["torch_zero"].peer
    with pytest.raises(
        UsageError, match="wrap zero1: option must be one of overlap, bucket_size_mb"
    ):
        wrap(torch.nn.Linear(2, 2), "zero1", buckets=3)
