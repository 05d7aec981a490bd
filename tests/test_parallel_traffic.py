"""What travels between ranks: how many collectives, in which order, how large, and when."""

from __future__ import annotations

import parallel_cases as ranks_do
import pytest
import torch
from parallel_fixtures import AVERAGING, BACKENDS, ON_RANKS
from ranks import pool

from cs336_systems.parallel.collectives import Collective

pytestmark = [*ON_RANKS, pytest.mark.parametrize("backend", BACKENDS)]
# Weight and bias of each layer.
SIZES = [ranks_do.WIDTH**2, ranks_do.WIDTH] * ranks_do.NUM_LAYERS
REPORT = len(SIZES)
MIB = 2**20


def reductions(step: list[Collective]) -> list[int]:
    return [entry.numel for entry in step if entry.name == "all_reduce"]


def padded(numel: int) -> int:
    """Round up to the 16 bytes at which fp32 gradients in buckets begin."""
    return 4 * ((numel + 3) // 4)


def buckets_by_hand(sizes: list[int], limit_bytes: float) -> list[int]:
    """Fill fp32 buckets one gradient after the other, from last to first; returns their sizes."""
    totals = [0]
    for size in sizes:
        if totals[-1] and 4 * (totals[-1] + padded(size)) > limit_bytes:
            totals.append(0)
        totals[-1] += padded(size)
    return totals


def steps_of(strategy: str, backend: str, **options: object) -> list[list[Collective]]:
    """Return the traffic of three steps, which must be the same on all ranks."""
    by_rank = pool(2, backend).run(ranks_do.traffic_of_steps, strategy, 3, **options)
    assert by_rank[0] == by_rank[1]
    return by_rank[0]


def test_naive_sends_every_gradient_in_the_parameters_order(backend: str) -> None:
    for step in steps_of("naive", backend):
        assert [entry.name for entry in step] == ["all_reduce"] * len(step)
        assert reductions(step) == [*SIZES, REPORT]


def test_flat_sends_all_gradients_at_once(backend: str) -> None:
    for step in steps_of("flat", backend):
        assert reductions(step) == [sum(SIZES), REPORT]
        assert len(step) == 2
        assert step[0].num_bytes == 4 * sum(SIZES)


def test_overlapped_sends_every_gradient_once(backend: str) -> None:
    steps = steps_of("overlapped", backend)
    for step in steps:
        assert sorted(reductions(step)[:-1]) == sorted(SIZES)
        assert reductions(step)[-1] == REPORT
    assert reductions(steps[0])[:-1] == SIZES[::-1]
    # Once, the ranks agree on the order in which rank 0 saw its gradients.
    broadcasts = [[e.numel for e in step if e.name == "broadcast"] for step in steps]
    assert broadcasts == [[], [len(SIZES)], []]


@pytest.mark.parametrize("limit_bytes", [1, 32, 129, 300, 10_000])
def test_flashddp_sends_buckets_in_reverse_order(limit_bytes: int, backend: str) -> None:
    steps = steps_of("flashddp", backend, bucket_size_mb=limit_bytes / MIB)
    assert steps == steps_of("flashddp_ce", backend, bucket_size_mb=limit_bytes / MIB)
    assert reductions(steps[0]) == [*buckets_by_hand(SIZES[::-1], limit_bytes), REPORT]
    for step in steps[1:]:
        totals = reductions(step)[:-1]
        assert sum(totals) == sum(map(padded, SIZES))
        assert all(4 * total <= limit_bytes or total in map(padded, SIZES) for total in totals)


def test_flashddp_without_a_size_sends_one_bucket(backend: str) -> None:
    for step in steps_of("flashddp", backend, bucket_size_mb=None):
        assert reductions(step) == [sum(map(padded, SIZES)), REPORT]


def test_the_first_bucket_is_small_when_the_others_are_not(backend: str) -> None:
    by_rank = pool(2, backend).run(ranks_do.wide_buckets, 8)
    # Layers of 0.64 MiB: one fits into the first MiB, and twelve into the second 8 MiB.
    first, *others = by_rank[0]
    assert first * 4 <= MIB
    assert others
    assert all(MIB < total * 4 <= 8 * MIB for total in others[:-1])


def test_no_communication_is_none(backend: str) -> None:
    assert steps_of("none", backend) == [[], [], []]


def test_checks_cost_one_more_number_per_rank(backend: str) -> None:
    for step in steps_of("flat", backend, check_finite=True):
        assert reductions(step) == [sum(SIZES), REPORT + 2]
        assert step[-1].dtype is torch.int32


@pytest.mark.parametrize("strategy", ["none", *AVERAGING])
def test_wrapping_checks_once_and_sends_tied_weights_once(strategy: str, backend: str) -> None:
    log = pool(2, backend).run(ranks_do.traffic_of_wrapping, strategy)[1]
    without_the_tied = SIZES[:2] + SIZES[3:]
    gathered = 0
    if strategy == "flashddp_ce":
        gathered = 3 if backend == "gloo" else 2
    assert [(entry.name, entry.numel) for entry in log] == [
        ("all_gather_into", 2 * 32),
        *(("broadcast", size) for size in without_the_tied),
        # Where ranks are; on the CPU, a file's name, and whether all have it; on GPUs, a barrier.
        *([("all_gather_object", 0)] * gathered),
    ]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("overlapped", {}),
        ("flashddp", {"bucket_size_mb": 1e-6}),
        ("flashddp_ce", {"bucket_size_mb": 1e-6}),
    ],
)
def test_reductions_start_during_the_backward_pass(
    strategy: str, options: dict[str, object], backend: str
) -> None:
    run = pool(2, backend).run(ranks_do.reductions_before_the_first_layer, strategy, **options)
    for before, in_all in run:
        # All but those of the first layer's weight and bias, and the report.
        assert before == in_all - 3 == len(SIZES) - 2


@pytest.mark.parametrize("strategy", ["naive", "flat"])
def test_reductions_start_after_the_backward_pass(strategy: str, backend: str) -> None:
    for before, in_all in pool(2, backend).run(
        ranks_do.reductions_before_the_first_layer, strategy
    ):
        assert before == 0
        assert in_all > 0


@pytest.mark.parametrize("strategy", AVERAGING)
def test_accumulation_reduces_once_per_step(strategy: str, backend: str) -> None:
    num_per_step = {
        micros: pool(2, backend).run(ranks_do.reductions_under_no_sync, strategy, micros)[0]
        for micros in (1, 3)
    }
    assert num_per_step[3]["finished"] == num_per_step[1]["finished"]
    first, second = num_per_step[3]["during"][:3], num_per_step[3]["during"][3:]
    assert first[:2] == second[:2] == [0, 0]
    assert (first[2] > 0) == (strategy in ("overlapped", "flashddp", "flashddp_ce"))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("overlapped", {}),
        ("flashddp", {"bucket_size_mb": 1e-6}),
        ("flashddp_ce", {"bucket_size_mb": 1e-6}),
    ],
)
def test_ranks_launch_in_one_order_though_their_gradients_appear_in_another(
    strategy: str, options: dict[str, object], backend: str
) -> None:
    zero, one = pool(2, backend).run(ranks_do.disagree_on_order, strategy, **options)
    assert zero["seen"] != one["seen"]
    assert zero["logs"] == one["logs"]
    assert all(zero["equal"])


@pytest.mark.parametrize("strategy", ["overlapped", "flashddp", "flashddp_ce"])
def test_the_launch_order_becomes_the_observed_one(strategy: str, backend: str) -> None:
    options = {} if strategy == "overlapped" else {"bucket_size_mb": 1e-6}
    first, third = pool(2, backend).run(ranks_do.first_launches, strategy, **options)[0]
    sizes = {8, 2, 12, 4} if strategy == "overlapped" else {8, 4, 12}
    assert set(first) == set(third) == sizes
    # Defined last and used first: its gradients come last.
    assert first.index(12) < first.index(8)
    assert third.index(8) < third.index(12)


@pytest.mark.parametrize("strategy", ["overlapped", "flashddp", "flashddp_ce"])
def test_a_module_wrapped_again_reduces_once(strategy: str, backend: str) -> None:
    num_reductions = len(SIZES) if strategy == "overlapped" else 1
    assert pool(2, backend).run(ranks_do.wrap_again, strategy)[0] == num_reductions + 1
