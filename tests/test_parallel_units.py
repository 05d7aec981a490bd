"""The parts of data parallelism that need no second rank: bucket assignment, launch order, layout,
the table."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from cs336_systems.errors import UsageError
from cs336_systems.parallel import STRATEGIES, collectives, option_names, wrap
from cs336_systems.parallel.bucket import ALIGNMENT_BYTES, Bucket, assign_buckets
from cs336_systems.parallel.collectives import record_collectives
from cs336_systems.parallel.layout import (
    gradient_strides,
    in_memory_order,
    is_dense,
    laid_out_gradient,
)
from cs336_systems.parallel.ready_queue import ReadyQueue

ITEMS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from("ab")), min_size=1, max_size=20)


@example([(5, "a"), (5, "a")], 10, 10)
@example([(0, "a"), (11, "a"), (0, "a")], 10, 3)
@given(ITEMS, st.integers(1, 60), st.integers(1, 60))
def test_buckets_hold_all_items_in_order_within_their_limit(
    items: list[tuple[int, str]], limit: int, first_limit: int
) -> None:
    sizes, kinds = zip(*items, strict=True)
    buckets = assign_buckets(sizes, kinds, limit, first_limit)
    assert sorted(item for bucket in buckets for item in bucket) == list(range(len(items)))
    assert [bucket[-1] for bucket in buckets] == sorted(bucket[-1] for bucket in buckets)
    for kind in set(kinds):
        of_kind = [bucket for bucket in buckets if kinds[bucket[0]] == kind]
        limits = [min(limit, first_limit)] + [limit] * (len(of_kind) - 1)
        flat = [item for bucket in of_kind for item in bucket]
        assert flat == [item for item in range(len(items)) if kinds[item] == kind]
        for number, (bucket, held_to) in enumerate(zip(of_kind, limits, strict=True)):
            total = sum(sizes[item] for item in bucket)
            assert total <= held_to or len(bucket) == 1
            if number + 1 < len(of_kind):
                # It was not closed before it had to be.
                assert total + sizes[of_kind[number + 1][0]] > held_to


@given(st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))), st.data())
def test_units_are_released_in_order_whatever_order_gradients_come_in(
    arrivals: list[int], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(arrivals)), max_size=4).map(sorted))
    planned = data.draw(st.permutations(range(len(arrivals))))
    bounds = [0, *cuts, len(arrivals)]
    units = [planned[a:b] for a, b in pairwise(bounds) if a < b]
    stop = data.draw(st.integers(0, len(arrivals)))
    queue = ReadyQueue(units)
    for _ in range(2):
        released: list[int] = []
        for count, index in enumerate(arrivals[:stop], 1):
            released += queue.mark(index)
            # Exactly the units before the first that still waits for one.
            there = set(arrivals[:count])
            complete = [there.issuperset(unit) for unit in units]
            assert released == list(range([*complete, False].index(False)))
        assert queue.marked == list(arrivals[:stop])
        released += queue.rest()
        assert released == list(range(len(units)))
        queue.reset()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        if draw(st.booleans()):
            tensor = tensor[..., :: draw(st.integers(1, 3))]
        if draw(st.booleans()):
            tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor


@example(torch.empty(0, 3).t())
@example(torch.ones(()))
@example(torch.ones(1, 5)[:, ::2])
@given(tensors())
def test_dense_means_every_place_of_a_run_once(tensor: torch.Tensor) -> None:
    places = {()} if tensor.dim() == 0 else None
    offsets = [
        sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        for index in (places or _indices(tensor.shape))
    ]
    assert is_dense(tensor) == (sorted(offsets) == list(range(tensor.numel())))
    if is_dense(tensor):
        run = in_memory_order(tensor)
        assert run.data_ptr() == tensor.data_ptr()
        assert sorted(run.tolist()) == sorted(tensor.flatten().tolist())


def _indices(shape: torch.Size) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.ones(shape).nonzero().tolist()]


@given(tensors(), st.booleans())
def test_a_gradient_is_brought_to_its_parameters_layout(
    values: torch.Tensor, has_gradient: bool
) -> None:
    parameter = nn.Parameter(values)
    before = torch.rand(values.shape) if has_gradient else None
    if before is not None:
        parameter.grad = before.clone()
    grad = laid_out_gradient(parameter)
    assert parameter.grad is grad
    assert grad.stride() == gradient_strides(parameter)
    assert is_dense(grad)
    assert torch.equal(grad, torch.zeros(values.shape) if before is None else before)
    # Autograd's own choice for a parameter that had none.
    parameter.grad = None
    (parameter * 1.0).sum().backward()
    if parameter.numel() > 1:
        assert [
            s for s, n in zip(parameter.grad.stride(), parameter.shape, strict=True) if n > 1
        ] == [s for s, n in zip(grad.stride(), parameter.shape, strict=True) if n > 1]


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    st.sampled_from([None, torch.bfloat16, torch.float64]),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.sampled_from([0, 1, 4, 5, 40, math.inf]),
)
def test_a_bucket_carries_every_gradient_and_zeros_elsewhere(
    shapes: list[list[int]],
    communication_dtype: torch.dtype | None,
    present: list[bool],
    in_place_bytes: float,
) -> None:
    parameters = [nn.Parameter(torch.rand(shape)) for shape in shapes]
    bucket = Bucket(parameters, communication_dtype, in_place_bytes)
    for parameter, view in zip(parameters, bucket.views, strict=True):
        stays = communication_dtype is None and parameter.nbytes >= in_place_bytes
        assert (view is None) == stays
    bucket.wire.fill_(7.0)
    for start in bucket._offsets:
        assert start * min(bucket.wire.itemsize, bucket.flat.itemsize) % ALIGNMENT_BYTES == 0
    bucket.wire.zero_()
    for view in bucket._wire_views:
        if view is not None:
            view.fill_(7.0)  # What an earlier step left.
    for slot, parameter in enumerate(parameters):
        if present[slot]:
            parameter.grad = torch.rand(parameter.shape)
            bucket.collect(slot)
    wanted = [None if p.grad is None else p.grad.clone() for p in parameters]
    bucket.fill()
    total = sum(float(w.to(bucket.wire.dtype).double().sum()) for w in wanted if w is not None)
    assert sum(run.double().sum().item() for run in bucket.messages) == pytest.approx(total)
    bucket.complete(2)
    assert not bucket.messages
    for parameter, view, want in zip(parameters, bucket.views, wanted, strict=True):
        if want is None and view is None:
            assert not parameter.grad.any()
        elif want is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, want.to(bucket.wire.dtype).float() / 2)
    bucket.fill_gaps()
    for parameter, view in zip(parameters, bucket.views, strict=True):
        assert parameter.grad is (parameter.grad if view is None else view)


def test_gradients_that_share_memory_are_parted() -> None:
    first, second = nn.Parameter(torch.rand(3, 2)), nn.Parameter(torch.rand(6))
    bucket = Bucket([first, second], None, in_place_bytes=0)
    (first.view(-1) + second.view(-1)).square().sum().backward()
    # Autograd's own doing.
    assert first.grad.data_ptr() == second.grad.data_ptr()
    wanted = first.grad.clone()
    for slot in range(2):
        bucket.collect(slot)
    bucket.fill()
    bucket.complete(4)
    torch.testing.assert_close(first.grad, wanted / 4)
    torch.testing.assert_close(second.grad, wanted.flatten() / 4)


@pytest.mark.parametrize("communication_dtype", [None, torch.bfloat16])
def test_gradients_gather_until_they_are_copied_together(
    communication_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cs336_systems.parallel.bucket._PENDING_BYTES", 40)
    parameters = [nn.Parameter(torch.rand(5)) for _ in range(5)]
    bucket = Bucket(parameters, communication_dtype)
    copies: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, source: (copies.append(len(to)), copy(to, source))
    )
    for slot, parameter in enumerate(parameters):
        parameter.grad = torch.full((5,), 1.0 + slot)
        if bucket.collect(slot):
            bucket.drain()
    bucket.fill()
    assert copies == [2, 2, 1]
    bucket.complete(1)
    assert [parameter.grad.tolist() for parameter in parameters] == [
        [1.0 + slot] * 5 for slot in range(5)
    ]


def test_recordings_that_are_equal_end_each_on_their_own() -> None:
    with record_collectives() as outer:
        with record_collectives() as inner:
            assert outer == inner == []
        assert [id(log) for log in collectives._observers] == [id(outer)]
    assert collectives._observers == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrapping_without_a_process_group_says_so(strategy: str) -> None:
    with pytest.raises(UsageError, match=r"^wrap: process group must be initialised"):
        wrap(nn.Linear(2, 2), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_common_options(strategy: str) -> None:
    names = option_names(STRATEGIES[strategy].load())
    common = {"group", "communication_dtype", "find_unused", "check_finite", "broadcast_buffers"}
    assert common <= set(names)
    assert "own_options" not in names


def test_an_unknown_strategy_and_option_list_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"^strategies: row must be one of none, naive, flat"):
        wrap(nn.Linear(2, 2), "ddp")
    with pytest.raises(
        UsageError, match=r"^wrap flashddp: option must be one of bucket_size_mb, .*"
    ):
        wrap(nn.Linear(2, 2), "flashddp", bucket_mb=3)
