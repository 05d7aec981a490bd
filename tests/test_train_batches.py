"""Are batches a function of seed and step alone, whoever asks for which part of them?"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.train.batches import Batches, spread_starts, windows
from cs336_systems.train.prefetch import Prefetcher

CPU = torch.device("cpu")


@example(num_tokens=6, context=5, share=1, world_size=1, seed=0, step=1)  # one window there is
@example(num_tokens=7, context=1, share=3, world_size=4, seed=2**64, step=10**12)
@given(
    num_tokens=st.integers(12, 400),
    context=st.integers(1, 11),
    share=st.integers(1, 5),
    world_size=st.integers(1, 6),
    seed=st.integers(0, 2**70),
    step=st.integers(0, 10**9),
)
def test_ranks_divide_a_batch_that_does_not_depend_on_them(
    num_tokens: int, context: int, share: int, world_size: int, seed: int, step: int
) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    settings = {"batch_size": share * world_size, "context_length": context, "seed": seed}
    whole = Batches(tokens, **settings).batch(step)
    assert whole.shape == (2, share * world_size, context)
    assert whole.dtype == torch.int64
    parts = [
        Batches(tokens, **settings, rank=rank, world_size=world_size).batch(step)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    # These tokens are their own positions: each target follows its input, within the data.
    assert torch.equal(whole[1], whole[0] + 1)
    assert torch.equal(whole[0, :, 1:], whole[0, :, :-1] + 1)
    assert 0 <= int(whole.min()) <= int(whole.max()) < num_tokens


@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6), other=st.integers(1, 10**6))
def test_steps_and_seeds_differ(seed: int, step: int, other: int) -> None:
    tokens = np.zeros(10**9 // 8, dtype=np.uint8)
    settings = {"batch_size": 8, "context_length": 4}
    own = Batches(tokens, seed=seed, **settings).starts(step)
    assert np.array_equal(own, Batches(tokens, seed=seed, **settings).starts(step))
    assert not np.array_equal(own, Batches(tokens, seed=seed, **settings).starts(step + other))
    assert not np.array_equal(own, Batches(tokens, seed=seed + other, **settings).starts(step))


def test_every_window_is_drawn() -> None:
    batches = Batches(np.arange(9), batch_size=64, context_length=4, seed=0)
    drawn = np.concatenate([batches.starts(step) for step in range(8)])
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3, 4]


@given(num_tokens=st.integers(2, 300), context=st.integers(1, 299), count=st.integers(1, 64))
def test_validation_windows_are_spread_from_the_first_to_the_last(
    num_tokens: int, context: int, count: int
) -> None:
    context = min(context, num_tokens - 1)
    starts = spread_starts(num_tokens, context, count)
    assert len(starts) == count
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    last = num_tokens - context - 1
    assert starts[-1] == (last if count > 1 else 0)
    assert int(windows(np.arange(num_tokens), starts, context).max()) < num_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 9}, "tokens must hold at least context_length . 1 = 10 tokens, got 9"),
        ({"world_size": 3}, "batch_size must be a multiple of 3 ranks, got 4"),
    ],
)
def test_what_cannot_be_divided(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=f"^batches: {message}$"):
        Batches(np.arange(9), **{"batch_size": 4, "context_length": 4, "seed": 0, **changes})


def test_prefetching_keeps_the_order_and_its_bound() -> None:
    made: list[int] = []

    def make(step: int) -> torch.Tensor:
        made.append(step)
        return torch.tensor(step)

    with Prefetcher(make, range(3, 40), CPU, depth=2) as data:
        assert int(data.next()) == 3
        time.sleep(0.1)
        # One taken, two ready, one in the hand.
        assert len(made) == 4
        assert [int(data.next()) for _ in range(36)] == list(range(4, 40))
        for _ in range(2):
            with pytest.raises(StopIteration):
                data.next()


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_leaving_early_ends_the_thread(num_taken: int) -> None:
    before = threading.active_count()
    with Prefetcher(torch.tensor, range(1000), CPU) as data:
        for _ in range(num_taken):
            data.next()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_the_threads_error_is_raised_where_its_batch_was_wanted() -> None:
    def make(step: int) -> torch.Tensor:
        if step == 2:
            raise LookupError("nothing at 2")
        return torch.tensor(step)

    with Prefetcher(make, range(9), CPU) as data:
        assert [int(data.next()) for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(LookupError, match="nothing at 2"):
                data.next()


@pytest.mark.gpu
def test_on_a_gpu_batches_come_from_pinned_memory() -> None:
    cuda = torch.device("cuda", 0)
    with Prefetcher(lambda step: torch.full((1000,), step), range(50), cuda) as data:
        for step in range(50):
            assert data.next().tolist() == [step] * 1000
