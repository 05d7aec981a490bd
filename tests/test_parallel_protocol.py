"""A step on several ranks: accumulation, unused parameters, state, and where gradients lie."""

from __future__ import annotations

import adapters
import parallel_cases as ranks_do
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import AVERAGING, BACKENDS, ON_RANKS
from ranks import pool

pytestmark = [*ON_RANKS, pytest.mark.parametrize("backend", BACKENDS)]
EVERY = pytest.mark.parametrize("strategy", AVERAGING)
NAMES = [f"layers.2.{kind}" for kind in ("weight", "bias")]


@EVERY
def test_no_sync_nests_and_is_left_by_exceptions(strategy: str, backend: str) -> None:
    for run in pool(2, backend).run(ranks_do.accumulate_with_faults, strategy):
        assert run["silent"] == 0
        for got, wanted in zip(run["got"], run["wanted"], strict=True):
            torch.testing.assert_close(got, wanted)


@EVERY
@pytest.mark.parametrize("skipping", [(0,), (1,), (0, 1)])
def test_unused_parameters_with_find_unused(
    strategy: str, skipping: tuple[int, ...], backend: str
) -> None:
    run = pool(2, backend).run(ranks_do.leave_unused, strategy, True, skipping)
    for message, got, wanted in run:
        assert message == ""
        everywhere = [
            None if skipping == (0, 1) and n in (4, 5) else g for n, g in enumerate(wanted)
        ]
        assert got == everywhere


@EVERY
@pytest.mark.parametrize("skipping", [(0,), (1,), (0, 1)])
def test_unused_parameters_are_an_error_of_all_ranks(
    strategy: str, skipping: tuple[int, ...], backend: str
) -> None:
    run = pool(2, backend).run(ranks_do.leave_unused, strategy, False, skipping)
    plural = "s" if len(skipping) > 1 else ""
    listed = ", ".join(f"{name!r} on {len(skipping)} rank{plural}" for name in NAMES)
    assert {message for message, _, _ in run} == {
        f"{strategy}: every trainable parameter must get a gradient, got none for {listed} (of 2); "
        "find_unused=True allows it"
    }
    for _, got, wanted in run:
        assert got == wanted  # Nobody has a stale or a local gradient.


@EVERY
@pytest.mark.parametrize(
    ("misuse", "text"),
    [
        ("finish_in_no_sync", "no_sync() must be left before gradients are synced"),
        ("clip_before_finish", "finish_gradient_synchronization must be called before clipping"),
        (
            "backward_twice",
            "backward must run once per step outside no_sync(), got a second gradient of "
            "'layers.3.weight' (reentrant checkpoints also cause it)",
        ),
    ],
)
def test_misuse_of_the_protocol_says_so(
    strategy: str, misuse: str, text: str, backend: str
) -> None:
    during_backward = strategy in ("overlapped", "flashddp", "flashddp_ce")
    errors = set(pool(2, backend).run(ranks_do.usage_error, strategy, misuse))
    if misuse == "finish_in_no_sync" or during_backward:
        assert len(errors) == 1
        error = errors.pop().replace("layers.3.bias", "layers.3.weight")
        assert error == f"{strategy}: {text}"
    else:
        assert errors == {"no error"}


@pytest.mark.parametrize("strategy", ["overlapped", "flashddp", "flashddp_ce"])
def test_a_second_pass_before_finishing_adds_up(strategy: str, backend: str) -> None:
    for got, wanted in pool(2, backend).run(ranks_do.unfinished_backward, strategy):
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)


@EVERY
def test_gradients_of_the_callers_own_are_averaged(strategy: str, backend: str) -> None:
    for got, wanted in pool(2, backend).run(ranks_do.foreign_gradients, strategy):
        assert got == wanted


@pytest.mark.parametrize("bucket_size_mb", [1e-6, 1e-4, None])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_the_buckets_memory(
    bucket_size_mb: float | None, set_to_none: bool, backend: str
) -> None:
    for inside in pool(2, backend).run(ranks_do.where_gradients_are, bucket_size_mb, set_to_none):
        assert all(inside)
        assert len(inside) == 3 * 3 * 2 * ranks_do.NUM_LAYERS


@EVERY
@example(seed=0)
@given(seed=st.integers(0, 9999))
@settings(max_examples=10)
def test_bf16_on_the_wire_errs_by_its_rounding(strategy: str, seed: int, backend: str) -> None:
    run = pool(2, backend).run(ranks_do.reduced_precision, strategy, seed)
    eps = torch.finfo(torch.bfloat16).eps
    for averages, by_rank, traffic in run:
        for got, *local in zip(averages, *by_rank, strict=True):
            assert got.dtype is torch.float32
            truth = sum(local[1:], local[0]) / 2
            # Each rank's gradient is rounded once and so is their sum, all to nearest.
            rounded = sum((grad.abs() for grad in local), truth.abs() * 2) / 2
            assert ((got - truth).abs() <= eps / 2 * (1 + eps) * rounded + 1e-30).all()
            assert not torch.equal(got, truth) or not got.any()
        assert {dtype for dtype, _ in traffic} == {torch.bfloat16, torch.int32}


@EVERY
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_buffers_are_rank_zeros_at_the_start_of_each_step(
    strategy: str, broadcast_buffers: bool, backend: str
) -> None:
    zero, one = pool(2, backend).run(ranks_do.buffers_over_steps, strategy, broadcast_buffers)
    assert zero["wrapped"] == one["wrapped"]
    assert zero["found"][0] == one["found"][0]
    # Running mean, variance and count of batches, what is expanded, gapped and boolean; and at the
    # second step's first pass, the order of launches.
    agreement = strategy in ("overlapped", "flashddp", "flashddp_ce")
    for step, (first, second) in enumerate(zero["counts"]):
        assert second == first
        assert first == (6 if broadcast_buffers and step else 0) + (agreement and step == 1)
    # A pass without gradients leaves them as they are: one rank may evaluate alone.
    for step in (1, 2):
        assert (zero["found"][step] == one["found"][step]) == broadcast_buffers
    assert zero["found"][3] != one["found"][3]


@EVERY
def test_state_moves_to_the_plain_module_and_back(strategy: str, backend: str) -> None:
    assert pool(2, backend).run(ranks_do.move_state, strategy) == [True, True]


@EVERY
def test_parameter_groups_and_schedules_work_as_alone(strategy: str, backend: str) -> None:
    for got, alone in pool(2, backend).run(ranks_do.train_with_groups, strategy):
        assert got == alone


@EVERY
def test_a_group_of_some_ranks(strategy: str, backend: str) -> None:
    if backend == "nccl":
        assert pool(2, backend).run(ranks_do.wrap_for_others, strategy) == [
            "averaged over two",
            "averaged over two",
        ]
    else:
        outside, *inside = pool(3, backend).run(ranks_do.wrap_for_others, strategy)
        assert outside == "wrap: group must contain this rank, got 'rank 0'"
        assert inside == ["averaged over two"] * 2


@pytest.mark.parametrize(
    ("get", "args", "start", "after"),
    [
        (
            adapters.get_ddp_individual_parameters,
            (),
            None,
            adapters.ddp_individual_parameters_on_after_backward,
        ),
        (adapters.get_ddp, (), None, adapters.ddp_on_after_backward),
        *(
            (
                adapters.get_ddp_bucketed,
                (size,),
                adapters.ddp_bucketed_on_train_batch_start,
                adapters.ddp_bucketed_on_after_backward,
            )
            for size in (0.0016, 0.0001, 0.01, None)
        ),
    ],
)
def test_the_courses_hooks_train_as_one_process(
    get: object, args: tuple[object, ...], start: object, after: object, backend: str
) -> None:
    for got, alone in pool(2, backend).run(ranks_do.train_by_hooks, get, args, start, after):
        assert got == alone
