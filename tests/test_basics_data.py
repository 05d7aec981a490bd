"""Are batches windows of the data, every window reachable, and targets one token later?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cs336_basics.data import get_batch
from hypothesis import example, given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=60)
@given(
    context_length=st.integers(1, 12),
    extra=st.integers(0, 12),
    batch_size=st.integers(1, 6),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.uint64]),
    seed=SEEDS,
)
@example(context_length=5, extra=0, batch_size=3, dtype=np.uint16, seed=0)
def test_a_batch_is_windows_and_the_same_one_later(
    context_length: int, extra: int, batch_size: int, dtype: Any, seed: int
) -> None:
    dataset = np.arange(context_length + 1 + extra).astype(dtype)
    generator = np.random.default_rng(seed)
    x, y = get_batch(dataset, batch_size, context_length, "cpu", generator=generator)
    for tensor in (x, y):
        assert tensor.shape == (batch_size, context_length)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(context_length).expand_as(x))
    assert x.data_ptr() != y.data_ptr()


def test_every_window_is_drawn_and_no_other() -> None:
    dataset = np.arange(10)
    x, _ = get_batch(dataset, 1000, 6, "cpu", generator=np.random.default_rng(0))
    counts = torch.bincount(x[:, 0], minlength=10)
    # Four starts, each drawn 250 times give or take five deviations.
    assert counts[4:].tolist() == [0] * 6
    assert (counts[:4] - 250).abs().max().item() < 5 * (1000 * 0.25 * 0.75) ** 0.5


def test_batches_follow_the_generator_or_else_the_seed_of_torch() -> None:
    dataset = np.arange(10_000)

    def starts(seed: int, generator: bool) -> list[int]:
        torch.manual_seed(seed if not generator else 0)
        source = np.random.default_rng(seed) if generator else None
        return get_batch(dataset, 8, 4, "cpu", source)[0][:, 0].tolist()

    for generator in (False, True):
        assert starts(1, generator) == starts(1, generator)
        assert starts(1, generator) != starts(2, generator)


def test_a_memory_mapped_file_will_do(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(60_000, 60_020, dtype=np.uint16).tofile(path)
    dataset = np.memmap(path, dtype=np.uint16, mode="r")
    x, y = get_batch(dataset, 4, 19, torch.device("cpu"))
    assert torch.equal(x, torch.arange(60_000, 60_019).expand(4, 19))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize(
    ("dataset", "batch_size", "context_length", "message"),
    [
        (
            np.arange(6),
            1,
            6,
            r"dataset must hold at least context_length \+ 1 = 7 tokens, got 6",
        ),
        (np.arange(0), 1, 1, r"dataset must hold at least context_length \+ 1 = 2 tokens, got 0"),
        (np.zeros(9), 1, 4, r"one-dimensional and of integers, got float64 of shape \(9,\)"),
        (np.zeros((3, 3), int), 1, 2, r"one-dimensional and of integers, got int64 of shape"),
        (np.arange(9), 0, 4, "batch_size must be at least 1, got 0"),
        (np.arange(9), 1, 0, "context_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(
    dataset: np.ndarray, batch_size: int, context_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"get_batch: .*{message}"):
        get_batch(dataset, batch_size, context_length, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_batch_reaches_the_gpu_without_the_host_waiting() -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, y = get_batch(np.arange(1000, dtype=np.uint16), 8, 32, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.is_cuda
    assert torch.equal(y, x + 1)
