"""The Hopper kernels: what they take, and on a Hopper GPU against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_within_budget, let_grow, term_magnitudes
from test_flash_triton import LAYOUTS, make, run
from torch import Tensor

from cs336_systems.attention import flash_hopper, hopper_launch, triton_launch, triton_run
from cs336_systems.attention.flash_hopper import flash_attention, flash_attention_hopper
from cs336_systems.attention.flash_triton import flash_attention_forward, flash_attention_triton
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.errors import UsageError

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 449]


# --- what they take ---


def half(*shape: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_row_says_so_and_the_choice_falls_back() -> None:
    q, k, v = half(1, 2, 8, 64)
    with pytest.raises(UsageError) as error:
        flash_attention_hopper(q, k, v)
    assert str(error.value) == "flash_attention_hopper: query must be on a CUDA device, got cpu"
    torch.testing.assert_close(flash_attention(q, k, v), flash_attention_triton(q, k, v))


def test_the_fallback_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    flash_hopper._say_once.cache_clear()
    q, k, v = (torch.zeros(1, 2, 8, 16, device="cuda" if HOPPER else "cpu") for _ in range(3))
    with caplog.at_level("INFO", logger=flash_hopper.__name__):
        for _ in range(3):
            flash_attention(q, k, v)
    (line,) = caplog.messages
    assert line.startswith("flash_attention: portable kernels, since query must ")


@pytest.mark.parametrize(("seq", "taken"), [(64, "portable"), (4096, "hopper")])
def test_short_calls_take_the_portable_kernels(
    seq: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host decides, describing tensors to the accelerator would only add to it."""
    called: list[str] = []
    monkeypatch.setattr(flash_hopper, "unfit", lambda *_: None)
    monkeypatch.setattr(
        flash_hopper, "flash_attention_hopper", lambda *_, **__: called.append("hopper")
    )
    monkeypatch.setattr(
        flash_hopper.FlashAttentionTriton, "apply", lambda *_: called.append("portable")
    )
    flash_attention(*half(1, 2, seq, 64))
    assert called == [taken]


def test_an_unknown_choice_of_kernels_lists_them() -> None:
    with pytest.raises(UsageError, match="kernels must be one of auto, portable, hopper, got 'x'"):
        flash_attention(*half(1, 1, 4, 64), kernels="x")  # type: ignore[arg-type]


class Device:
    """A tensor's stand-in on a GPU that is not here."""

    type, index = "cuda", 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"capability": (8, 0)}, "device must have compute capability 9.0, got 8.0"),
        ({"capability": (10, 0)}, "device must have compute capability 9.0, got 10.0"),
        ({"triton": "3.7.0"}, "Triton must be 3.6.x, got 3.7.0"),
        ({"dtype": torch.float32}, "query must have dtype float16 or bfloat16, got torch.float32"),
        ({"head_dim": 96}, "query must have a head dim of 64 or 128, got 96"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = change.get("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(flash_hopper.triton, "__version__", change.get("triton", "3.6.0"))

    class Query:
        device = Device()
        dtype = change.get("dtype", torch.bfloat16)
        shape = (1, 2, 8, change.get("head_dim", 128))

    q: Any = Query()
    assert flash_hopper.unfit(q, change.get("scale")) == said


# --- on a Hopper GPU ---


def check(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **how: Any) -> None:
    """Hold output, L and gradients to a multiple of what the plain formula errs in this dtype."""
    exact = reference_gradients(q, k, v, do, **how)
    plain = run(scaled_dot_prod_attention, q, k, v, do, **how)
    got = run(flash_attention_hopper, q, k, v, do, **how)
    magnitudes = term_magnitudes(q, k, v, do, scale=how.get("scale"), rounded_scores=True)
    assert_within_budget(got, plain, [exact.o, exact.dq, exact.dk, exact.dv], magnitudes)
    scale = how.get("scale") or q.shape[-1] ** -0.5
    _, lse = flash_attention_forward(
        q.detach(), k.detach(), v.detach(), how.get("is_causal", False), scale, "hopper"
    )
    _, portable = flash_attention_forward(
        q.detach(), k.detach(), v.detach(), how.get("is_causal", False), scale
    )
    torch.testing.assert_close(lse, portable, rtol=1e-5, atol=1e-4)


def check_repeats(q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, is_causal: bool) -> None:
    """A hundred backward passes: dK and dV bit by bit, dQ to what adding in another order
    changes."""
    _, dq, dk, dv = run(flash_attention_hopper, q, k, v, do, is_causal=is_causal)
    eps = torch.finfo(torch.bfloat16).eps
    for _ in range(100):
        _, *again = run(flash_attention_hopper, q, k, v, do, is_causal=is_causal)
        assert torch.equal(again[1], dk)
        assert torch.equal(again[2], dv)
        torch.testing.assert_close(again[0], dq, rtol=eps, atol=2**-20)


def on_hopper(test: Any) -> Any:
    for mark in ON_HOPPER:
        test = mark(test)
    return test


@on_hopper
@given(
    seed=st.integers(0, 2**16),
    layout=st.sampled_from(LAYOUTS),
    group=st.sampled_from([1, 2, 3]),
    kv_heads=st.sampled_from([1, 2]),
    num_queries=st.sampled_from(EDGES),
    num_keys=st.sampled_from(EDGES),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.05, 1.0]),
)
@example(0, "contiguous", 1, 1, 1, 1, 64, torch.float16, True, None)
@example(0, "fused qkv", 2, 2, 129, 65, 64, torch.float16, True, None)
@example(0, "padded", 3, 1, 65, 449, 128, torch.bfloat16, True, None)
@example(0, "broadcast heads", 2, 2, 257, 129, 128, torch.float16, False, 1.0)
def test_any_shape_layout_and_scale(
    seed: int,
    layout: str,
    group: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    scale: float | None,
) -> None:
    heads, lengths = (group * kv_heads, kv_heads), (num_queries, num_keys)
    inputs = make(layout, heads, lengths, head_dim, dtype, seed, 2)
    check(*inputs, is_causal=is_causal, scale=scale)


@contextmanager
def long_sequences() -> Iterator[None]:
    """Have head dim 64 take the kernels of long sequences, whatever the length."""
    with (
        mock.patch.object(hopper_launch, "FOUR_GROUPS_QUERIES", 0),
        mock.patch.dict(hopper_launch.THREE_GROUPS_KEYS, {True: 0, False: 0}),
        mock.patch.object(triton_run, "_REPLAYS", {}),
    ):
        yield


@on_hopper
@given(
    seed=st.integers(0, 2**16),
    layout=st.sampled_from(LAYOUTS),
    group=st.sampled_from([1, 2, 3]),
    num_queries=st.sampled_from(EDGES),
    num_keys=st.sampled_from(EDGES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    is_causal=st.booleans(),
)
@example(0, "contiguous", 1, 1, 1, torch.float16, True)
@example(0, "fused qkv", 2, 129, 65, torch.float16, True)
@example(0, "padded", 3, 65, 449, torch.bfloat16, False)
def test_kernels_of_long_sequences_on_any_shape(
    seed: int,
    layout: str,
    group: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    is_causal: bool,
) -> None:
    with long_sequences():
        inputs = make(layout, (group, 1), (num_queries, num_keys), 64, dtype, seed, 2)
        check(*inputs, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize(("is_causal", "num_keys"), [(False, 2048), (True, 8192)])
def test_long_sequences_take_three_groups(is_causal: bool, num_keys: int) -> None:
    """The row's own choice, held to fp64 and to itself a hundred times: dK and dV bit by bit."""
    inputs = make("contiguous", (2, 1), (num_keys, num_keys), 64, torch.bfloat16, batch=1)
    chosen = hopper_launch.backward_tile(64, num_keys, causal=is_causal)
    assert chosen == hopper_launch.THREE_GROUPS
    check(*inputs, is_causal=is_causal)
    check_repeats(*inputs, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_gets_no_weight_where_all_logits_are_very_negative(
    is_causal: bool, head_dim: int
) -> None:
    q, k, v, do = make("contiguous", (1, 1), (70, 133), head_dim, torch.bfloat16, batch=1)
    q, k = (tensor.detach().abs() + 3.0 for tensor in (q, k))
    check(q.requires_grad_(), (-k).requires_grad_(), v, do, is_causal=is_causal, scale=1.0)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("per_tile", [3.0, 20.0])
def test_maxima_grow_by_less_and_by_more_than_the_slack(
    is_causal: bool, head_dim: int, per_tile: float
) -> None:
    """Logits grow towards the first keys, which come last, so that O is multiplied or is not."""
    q, k, v, do = make("contiguous", (2, 2), (300, 800), head_dim, torch.bfloat16, batch=1)
    let_grow(q, k, per_tile)
    check(q, k, v, do, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_maxima_that_are_negative_and_grow(is_causal: bool, head_dim: int) -> None:
    """Maxima are looked for as integers, which does not find negative ones."""
    q, k, v, do = make("contiguous", (2, 2), (300, 800), head_dim, torch.bfloat16, batch=1)
    with torch.no_grad():
        q.copy_(q * 0.1 + 1.0)
        k.copy_(k * 0.1 - 1.0 - torch.arange(800, device=k.device)[:, None] / 16.0)
    check(q, k, v, do, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_forward_pass_is_bitwise_repeatable(is_causal: bool, head_dim: int) -> None:
    """A race would show: two hundred runs, one result."""
    q, k, v, _ = make("contiguous", (8, 4), (1100, 1000), head_dim, torch.bfloat16, batch=2)
    first = flash_attention_hopper(q, k, v, is_causal=is_causal)
    for _ in range(200):
        assert torch.equal(flash_attention_hopper(q, k, v, is_causal=is_causal), first)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_backward_pass_repeats_but_for_the_order_of_additions(
    is_causal: bool, head_dim: int
) -> None:
    inputs = make("contiguous", (8, 4), (1100, 1000), head_dim, torch.bfloat16, batch=2)
    check_repeats(*inputs, is_causal=is_causal)


@on_hopper
def test_deterministic_takes_the_portable_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make("contiguous", (2, 2), (129, 129), 64, torch.bfloat16)
    launched: list[str] = []
    original = triton_launch.Launch.run
    monkeypatch.setattr(triton_run, "_REPLAYS", {})
    monkeypatch.setattr(
        triton_launch.Launch,
        "run",
        lambda self: (launched.append(self.kernel.fn.__name__), original(self))[1],
    )
    run(flash_attention_hopper, *inputs, deterministic=True)
    assert launched == ["forward_kernel", "preprocess_kernel", "keys_kernel", "queries_kernel"]


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiled_as_one_graph(head_dim: int) -> None:
    inputs = make("contiguous", (4, 2), (300, 300), head_dim, torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention_hopper(q, k, v, is_causal=True) * 1.0

    eager, compiled = run(attend, *inputs), run(torch.compile(attend, fullgraph=True), *inputs)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3)


@on_hopper
def test_shapes_that_have_run_may_be_captured() -> None:
    q, k, v, _ = make("contiguous", (4, 2), (300, 400), 64, torch.bfloat16, batch=1)
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    want = flash_attention_hopper(q, k, v, is_causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flash_attention_hopper(q, k, v, is_causal=True)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
    with (
        pytest.warns(UserWarning, match="Graph is empty"),
        pytest.raises(UsageError, match=r"shapes must have been run once before a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        flash_attention_hopper(q[:, :, :77], k, v, is_causal=True)
