"""The Triton kernels against fp64: any shape, layout, dtype and scale, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_within_budget, term_magnitudes
from torch import Tensor

from cs336_systems.attention import triton_launch, triton_replay, triton_run
from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.flash_triton import (
    FlashAttentionTriton,
    flash_attention_backward,
    flash_attention_forward,
    flash_attention_triton,
)
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_attention, reference_gradients
from cs336_systems.attention.tiles import tiles_for
from cs336_systems.errors import UsageError
from cs336_systems.measure.memory import saved_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
EDGES = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129]
EDGES += [255, 256, 257, 300] if ON_GPU else []
HEAD_DIMS = [1, 8, 16, 24, 32, 40, 64, 80, 96, 128] + ([111, 192, 256] if ON_GPU else [])
LAYOUTS = ["contiguous", "batch, seq, heads", "fused qkv", "padded", "broadcast heads"]


def make(
    layout: str,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the output's gradient as leaves in some layout, last dim contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    (q_heads, kv_heads), (num_queries, num_keys) = heads, lengths
    if layout == "fused qkv":
        width, rows = q_heads + 2 * kv_heads, max(lengths)
        fused = draw(batch, rows, width, head_dim).transpose(1, 2)
        q, k, v = fused.split([q_heads, kv_heads, kv_heads], dim=1)
        q, k, v = q[:, :, :num_queries], k[:, :, :num_keys], v[:, :, :num_keys]
    elif layout == "batch, seq, heads":
        q = draw(batch, num_queries, q_heads, head_dim).transpose(1, 2)
        k, v = (draw(batch, num_keys, kv_heads, head_dim).transpose(1, 2) for _ in "kv")
    elif layout == "padded":
        q = draw(batch, q_heads, num_queries, head_dim + 3)[..., 1 : head_dim + 1]
        k, v = (draw(batch, kv_heads, num_keys, head_dim + 3)[..., :head_dim] for _ in "kv")
    elif layout == "broadcast heads":
        q = draw(batch, q_heads, num_queries, head_dim)
        k, v = (draw(batch, 1, num_keys, head_dim).expand(-1, kv_heads, -1, -1) for _ in "kv")
    else:
        q = draw(batch, q_heads, num_queries, head_dim)
        k, v = (draw(batch, kv_heads, num_keys, head_dim) for _ in "kv")
    do = draw(batch, num_queries, q_heads, head_dim).transpose(1, 2)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    return q, k, v, do


def run(function: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **how: Any) -> list[Tensor]:
    """Return the output and the three gradients."""
    o = function(q, k, v, **how)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def check(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, deterministic: bool = False, **how: Any
) -> None:
    """Hold output, L and gradients to a multiple of what the plain formula errs in this dtype."""
    exact = reference_gradients(q, k, v, do, **how)
    truth = [exact.o, exact.dq, exact.dk, exact.dv]
    plain = run(scaled_dot_prod_attention, q, k, v, do, **how)
    got = run(flash_attention_triton, q, k, v, do, deterministic=deterministic, **how)
    scale = how.get("scale")
    magnitudes = term_magnitudes(q, k, v, do, scale=scale, rounded_scores=True)
    assert_within_budget(got, plain, truth, magnitudes)
    check_lse(q, k, v, exact.lse, **how)


def check_lse(
    q: Tensor, k: Tensor, v: Tensor, exact: Tensor, *, is_causal: bool = False,
    scale: float | None = None,
) -> None:  # fmt: skip
    """Hold L, always fp32, to what rounding the largest term of a score errs."""
    scale = scale_or_default(scale, q.shape[-1])
    _, lse = flash_attention_forward(q.detach(), k.detach(), v.detach(), is_causal, scale)
    assert lse.dtype == torch.float32
    keys, _ = repeat_heads(q, k, v)
    terms = (q.abs().double() @ keys.abs().double().transpose(-2, -1)).max().item() * abs(scale)
    budget = 4 * torch.finfo(torch.float32).eps * max(1.0, terms, exact.abs().max().item())
    assert (lse.double() - exact).abs().max().item() <= budget


@contextmanager
def loading(accelerated: bool) -> Iterator[None]:
    """Let the tensor memory accelerator load however small the tensors, or not at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "TMA_FLOPS", 0 if accelerated else math.inf)
        patch.setattr(triton_run, "_REPLAYS", {})
        yield


def adds_dq(monkeypatch: pytest.MonkeyPatch, *inputs: Tensor, **how: Any) -> bool:
    """Run both passes for the first time on such inputs; tell whether dQ was added up."""
    launched: list[triton_launch.Launch] = []
    original = triton_launch.Launch.run
    monkeypatch.setattr(triton_run, "_REPLAYS", {})
    monkeypatch.setattr(
        triton_launch.Launch, "run", lambda self: (launched.append(self), original(self))[1]
    )
    run(flash_attention_triton, *inputs, **how)
    (keys,) = [launch for launch in launched if "ADD_DQ" in launch.arguments]
    assert len(launched) == 4
    return keys.arguments["ADD_DQ"]


class TestAgainstFp64:
    """Error budget: a multiple of the plain same-precision version's own error."""

    @given(
        seed=st.integers(0, 2**16),
        layout=st.sampled_from(LAYOUTS),
        group=st.sampled_from([1, 2, 3]),
        kv_heads=st.sampled_from([1, 2]),
        num_queries=st.sampled_from(EDGES),
        num_keys=st.sampled_from(EDGES),
        head_dim=st.sampled_from(HEAD_DIMS),
        dtype=st.sampled_from(DTYPES),
        is_causal=st.booleans(),
        deterministic=st.booleans(),
        scale=st.sampled_from([None, 0.05, 1.0, -0.3, 0.0]),
        accelerated=st.booleans() if ON_GPU else st.just(False),
    )
    @example(0, "contiguous", 1, 1, 1, 1, 16, torch.float32, True, False, None, False)
    @example(0, "fused qkv", 2, 2, 129, 65, 64, torch.float16, True, False, None, ON_GPU)
    @example(0, "padded", 1, 2, 65, 129, 40, torch.float16, False, True, -0.3, False)
    @example(
        0, "contiguous", 2, 1, EDGES[-4], EDGES[-1], 128, torch.float16, False, True, None, ON_GPU
    )
    def test_any_shape_layout_and_scale(
        self,
        seed: int,
        layout: str,
        group: int,
        kv_heads: int,
        num_queries: int,
        num_keys: int,
        head_dim: int,
        dtype: torch.dtype,
        is_causal: bool,
        deterministic: bool,
        scale: float | None,
        accelerated: bool,
    ) -> None:
        heads, lengths = (group * kv_heads, kv_heads), (num_queries, num_keys)
        batch = 2 if ON_GPU else 1
        q, k, v, do = make(layout, heads, lengths, head_dim, dtype, seed, batch)
        with loading(accelerated):
            check(q, k, v, do, is_causal=is_causal, scale=scale, deterministic=deterministic)

    @given(
        seed=st.integers(0, 2**16),
        length=st.sampled_from([1, 17, 64, 65, 128]),
        size=st.sampled_from([1.0, 1e2, 1e4]),
        is_causal=st.booleans(),
        deterministic=st.booleans(),
    )
    @example(4765, 17, 1e4, False, False)  # Weights of 1 err by the roundings of S and L alone.
    def test_logits_up_to_ten_thousand(
        self, seed: int, length: int, size: float, is_causal: bool, deterministic: bool
    ) -> None:
        q, k, v, do = make("contiguous", (1, 1), (length, length), 16, torch.float32, seed)
        how = {"is_causal": is_causal, "scale": size / 16}
        exact = reference_gradients(q, k, v, do, **how)
        got = run(flash_attention_triton, q, k, v, do, deterministic=deterministic, **how)
        plain = run(scaled_dot_prod_attention, q, k, v, do, **how)
        magnitudes = term_magnitudes(q, k, v, do, **how, rounded_scores=True)
        assert_within_budget(got, plain, [exact.o, exact.dq, exact.dk, exact.dv], magnitudes)
        assert all(torch.isfinite(tensor).all() for tensor in got)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [-3e4, 0.0, 3e4])
    def test_constant_rows_give_the_mean(self, dtype: torch.dtype, value: float) -> None:
        """All logits alike, however large: every key has the same weight."""
        q = torch.full((1, 70, 16), math.sqrt(abs(value)) / 4, device=DEVICE, dtype=dtype)
        k = torch.full((1, 70, 16), math.copysign(math.sqrt(abs(value)) / 4, value))
        v = torch.randn(1, 70, 16).to(DEVICE, dtype)
        o = flash_attention_triton(q, k.to(DEVICE, dtype), v, scale=1.0)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            o.double(), v.double().mean(1, True).expand_as(v), rtol=0, atol=4 * eps
        )

    @pytest.mark.parametrize("shape", [(33, 16), (3, 33, 16), (2, 3, 33, 16), (2, 2, 3, 33, 16)])
    def test_any_number_of_leading_dimensions(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(3)
        q, k, v, do = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4))
        for tensor in (q, k, v):
            tensor.requires_grad_()
        check(q, k, v, do, is_causal=True)


class TestKnownBugs:
    """Each has hit a well-known implementation; the thread is named where there is one."""

    def test_causal_with_more_queries_than_keys(self) -> None:
        """flash-attention 443, 1778: rows below the square were NaN or 0."""
        q, k, v, do = make("contiguous", (2, 2), (130, 17), 16, torch.float32)
        check(q, k, v, do, is_causal=True)

    def test_row_that_sees_nothing_is_zero_with_lse_minus_infinity(self) -> None:
        """pytorch 131060, 134650."""
        q, k, v, do = make("contiguous", (2, 2), (5, 0), 16, torch.float32)
        o, lse = flash_attention_forward(q.detach(), k.detach(), v.detach(), True, 0.25)
        assert torch.equal(o, torch.zeros_like(o))
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))
        o, dq, dk, dv = run(flash_attention_triton, q, k, v, do)
        assert torch.equal(dq, torch.zeros_like(q))
        assert dk.shape == k.shape
        assert dv.shape == v.shape

    @pytest.mark.parametrize("size", [1e5, 2.0**22])
    def test_no_finite_stand_in_for_minus_infinity(self, size: float) -> None:
        """flashinfer 4401: logits below the stand-in gave rows of 0."""
        q = torch.ones(1, 40, 16, device=DEVICE)
        k = torch.full((1, 40, 16), -size / 16, device=DEVICE)
        v = torch.randn(1, 40, 16, device=DEVICE)
        o = flash_attention_triton(q, k, v, is_causal=True, scale=1.0)
        expected, _ = reference_attention(q, k, v, is_causal=True, scale=1.0)
        torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_padding_gets_no_weight_where_all_logits_are_very_negative(
        self, is_causal: bool, deterministic: bool
    ) -> None:
        """Past the last key a tile reads 0: a logit far above the rest, whose weight overflows."""
        q, k, v, do = make("contiguous", (1, 1), (5, 33), 16, torch.float32, batch=1)
        q, k = (tensor.detach().abs() + 3.0 for tensor in (q, k))
        q, k = q.requires_grad_(), (-k).requires_grad_()
        how = {"is_causal": is_causal, "scale": 1.0}
        assert reference_attention(q, k, v, **how)[1].max() < -100
        check(q, k, v, do, deterministic=deterministic, **how)

    @pytest.mark.parametrize("head_dim", [1, 17, 40, 96, 111, *([192, 256] if ON_GPU else [])])
    def test_all_columns_of_the_head_are_used(self, head_dim: int) -> None:
        """triton 621, sglang 1281: 64 columns, whatever the head dim."""
        q, k, v, do = make("contiguous", (1, 1), (70, 70), head_dim, torch.float16)
        check(q, k, v, do, is_causal=True)

    @pytest.mark.parametrize("source", ["argument", "torch.use_deterministic_algorithms"])
    def test_deterministic_reaches_the_kernels(
        self, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """flash-attention 1766: the flag was dropped on the way."""
        inputs = make("contiguous", (1, 1), (61, 61), 16, torch.float16)
        torch.use_deterministic_algorithms(source != "argument")
        try:
            assert not adds_dq(monkeypatch, *inputs, deterministic=source == "argument")
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(
        ("layout", "head_dim", "one_pass"),
        [("contiguous", 16, True), ("contiguous", 9, False), ("padded", 16, False)],
    )
    def test_one_pass_needs_loads_of_whole_vectors(
        self, layout: str, head_dim: int, one_pass: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Triton 3.6 on sm_90: illegal memory accesses where loads are not pipelined."""
        inputs = make(layout, (1, 1), (62, 62), head_dim, torch.float16)
        assert adds_dq(monkeypatch, *inputs) is one_pass

    def test_deterministic_runs_are_bitwise_equal(self) -> None:
        """flash-attention 414, 746, 988: atomic additions in any order."""
        size, heads = (1000, (4, 2)) if ON_GPU else (70, (2, 1))
        q, k, v, do = make("contiguous", heads, (size, size), 64, torch.float16, batch=1)
        how = {"is_causal": True, "deterministic": True}
        first = run(flash_attention_triton, q, k, v, do, **how)
        for _ in range(19):
            again = run(flash_attention_triton, q, k, v, do, **how)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(
        ("heads", "lengths", "head_dim"),
        [((4, 4), (512, 512), 128), ((4, 2), (448, 512), 128), ((2, 1), (333, 400), 96)],
    )
    def test_operands_held_in_registers_change_no_bit(
        self,
        heads: tuple[int, int],
        lengths: tuple[int, int],
        head_dim: int,
        is_causal: bool,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The assembler was seen to overwrite them: see `compile_only.overwritten_operands`."""
        q, k, v, do = make("contiguous", heads, lengths, head_dim, dtype)
        table = tiles_for(q)
        if not table.queries.hold:
            pytest.skip(f"needs a GPU whose table holds operands, found {table.queries}")
        loose = replace(
            table,
            keys=replace(table.keys, hold=False, num_stages=2),
            queries=replace(table.queries, hold=False, num_stages=2),
        )
        with loading(accelerated=True):
            held = run(flash_attention_triton, q, k, v, do, is_causal=is_causal)
        monkeypatch.setattr(triton_run, "tiles_for", lambda q: loose)
        with loading(accelerated=True):
            expected = run(flash_attention_triton, q, k, v, do, is_causal=is_causal)
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
    def test_forward_has_no_race(self, head_dim: int) -> None:
        """flash-attention 359, 2033: shown by repetition only."""
        q, k, v, _ = make("contiguous", (8, 8), (1999, 1999), head_dim, torch.bfloat16)
        first = flash_attention_triton(q, k, v, is_causal=True)
        for _ in range(50):
            assert torch.equal(first, flash_attention_triton(q, k, v, is_causal=True))

    def test_nothing_is_read_from_or_left_in_fresh_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """triton 4217, 9230: an unwritten region looked right by luck; here it would be NaN."""
        empty_like, new_empty = torch.empty_like, Tensor.new_empty
        empty_strided = torch.empty_strided

        def poisoned_like(*args: Any, **kwargs: Any) -> Tensor:
            return empty_like(*args, **kwargs).fill_(float("nan"))

        def poisoned_new(*args: Any, **kwargs: Any) -> Tensor:
            poisoned.append(new_empty(*args, **kwargs).fill_(float("nan")))
            return poisoned[-1]

        def poisoned_strided(*args: Any, **kwargs: Any) -> Tensor:
            poisoned.append(empty_strided(*args, **kwargs).fill_(float("nan")))
            return poisoned[-1]

        poisoned: list[Tensor] = []
        q, k, v, do = make("batch, seq, heads", (2, 1), (129, 65), 24, torch.float32)
        clean = [run(flash_attention_triton, q, k, v, do, deterministic=d) for d in (False, True)]
        monkeypatch.setattr(triton_run.torch, "empty_like", poisoned_like)
        monkeypatch.setattr(Tensor, "new_empty", poisoned_new)
        monkeypatch.setattr(triton_replay.torch, "empty_strided", poisoned_strided)
        for deterministic, expected in zip((False, True), clean, strict=True):
            got = run(flash_attention_triton, q, k, v, do, deterministic=deterministic)
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert poisoned


class TestSaved:
    """What waits for the backward pass."""

    @pytest.mark.parametrize("leading", [(2,), (2, 3)])
    def test_saved_are_inputs_output_and_lse(self, leading: tuple[int, ...]) -> None:
        q, k, v = (
            torch.randn(*leading, rows, 16, device=DEVICE, requires_grad=True)
            for rows in (20, 30, 30)
        )
        o = FlashAttentionTriton.apply(q, k, v, True)
        saved = o.grad_fn.saved_tensors
        assert [tuple(tensor.shape) for tensor in saved].count((*leading, 20)) == 1
        assert len(saved) == 5
        (lse,) = [tensor for tensor in saved if tensor.shape == (*leading, 20)]
        _, expected = reference_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)

    def test_memory_is_linear_and_half_stays_half(self) -> None:
        kept = {}
        for length in (32, 64):
            q, k, v, _ = make("contiguous", (1, 1), (length, length), 16, torch.float16, batch=1)
            kept[length] = saved_bytes(lambda q=q, k=k, v=v: flash_attention_triton(q, k, v))
        # q, k, v and O in two bytes an element, L in four bytes a row.
        assert kept == {length: length * (4 * 16 * 2 + 4) for length in kept}

    def test_default_arguments_of_the_function(self) -> None:
        q, k, v, _ = make("contiguous", (1, 1), (33, 33), 16, torch.float32)
        full = flash_attention_triton(q, k, v)
        assert torch.equal(FlashAttentionTriton.apply(q, k, v), full)
        causal = flash_attention_triton(q, k, v, is_causal=True)
        assert torch.equal(FlashAttentionTriton.apply(q, k, v, True), causal)
        assert not torch.equal(full, causal)


class TestOperator:
    """A registered operator: visible to torch.compile, checked by torch's own checks."""

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_opcheck(self, is_causal: bool) -> None:
        q, k, v, do = make("batch, seq, heads", (2, 1), (33, 20), 16, torch.float32)
        found = torch.library.opcheck(flash_attention_forward, (q, k, v, is_causal, 0.3))
        assert set(found.values()) == {"SUCCESS"}
        q, k, v = (tensor.detach() for tensor in (q, k, v))
        o, lse = flash_attention_forward(q, k, v, is_causal, 0.3)
        arguments = (do, q, k, v, o, lse, is_causal, 0.3, True)
        found = torch.library.opcheck(flash_attention_backward, arguments)
        assert set(found.values()) == {"SUCCESS"}

    def test_gradients_of_the_operator_itself(self) -> None:
        q, k, v, do = make("contiguous", (2, 1), (33, 20), 16, torch.float32)
        o, lse = flash_attention_forward(q, k, v, True, 0.25)
        assert not lse.requires_grad
        got = torch.autograd.grad(o, (q, k, v), do)
        expected = run(flash_attention_triton, q, k, v, do, is_causal=True, scale=0.25)
        torch.testing.assert_close(list(got), expected[1:], rtol=1e-5, atol=1e-5)

    def test_compiles_to_one_graph(self) -> None:
        q, k, v, do = make("contiguous", (2, 2), (33, 33), 16, torch.float32)
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        function = torch.compile(FlashAttentionTriton.apply, fullgraph=True, backend=keep)
        expected = run(flash_attention_triton, q, k, v, do, is_causal=True)
        o = function(q, k, v, True)
        got = [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 1

    def test_compiled_with_the_default_backend(self) -> None:
        from cs336_systems.table import has_compiler

        if not has_compiler():
            pytest.skip("needs a C++ compiler, found none on PATH")
        q, k, v, do = make("batch, seq, heads", (2, 1), (40, 33), 16, torch.float32)
        torch.compiler.reset()
        function = torch.compile(flash_attention_triton, fullgraph=True)
        expected = run(flash_attention_triton, q, k, v, do, is_causal=True)
        got = run(function, q, k, v, do, is_causal=True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    def test_under_autocast(self) -> None:
        dtype = torch.float16
        q, k, v, do = make("contiguous", (1, 1), (33, 33), 16, torch.float32)
        with torch.autocast(DEVICE, dtype):
            o = flash_attention_triton(q, k, v, is_causal=True)
        assert o.dtype == dtype
        gradients = torch.autograd.grad(o, (q, k, v), do.to(dtype))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        halves = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        expected = run(flash_attention_triton, *halves, do.to(dtype), is_causal=True)
        assert torch.equal(o, expected[0])
        torch.testing.assert_close(gradients[2], expected[3].float(), rtol=1e-3, atol=1e-3)

    def test_second_derivative_is_refused(self) -> None:
        q, k, v, _ = make("contiguous", (1, 1), (8, 8), 16, torch.float32)
        o = flash_attention_triton(q, k, v)
        (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient must not be differentiated again"):
            dq.sum().backward()

    def test_shapes_without_memory(self) -> None:
        q, k, v = (torch.empty(2, 4, 8, 16, device="meta") for _ in range(3))
        o = flash_attention_triton(q, k, v)
        assert o.device.type == "meta"
        assert o.shape == q.shape


class TestArguments:
    """Never a wrong number: an error that names argument, rule and value."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: (x, x[..., :8], x), "attention: key must have head dim 16, got 8"),
            (lambda x: (x, x, x.half()), "attention: value must have dtype torch.float32, got"),
            (lambda x: (x, x, x.to("meta")), "attention: value must be on "),
            (lambda x: (x.double(),) * 3, "attention: query must have dtype float16, bfloat16 or"),
            (lambda x: (x.long(),) * 3, "attention: query must have a floating-point dtype, got"),
            (lambda x: (x.repeat(1, 1, 17),) * 3, "attention: query must have a head dim from 1"),
            (
                lambda x: (x.mT.contiguous().mT, x, x),
                "attention: query must have a contiguous last",
            ),
            (lambda x: (x, x, x[..., ::2].repeat(1, 1, 1)), "attention: value must have head dim"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change: Any, message: str) -> None:
        x = torch.randn(2, 8, 16, device=DEVICE)
        with pytest.raises(UsageError) as caught:
            flash_attention_triton(*change(x))
        assert str(caught.value).startswith(message)
        assert "got" in str(caught.value)

    def test_cpu_tensor_without_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        x = torch.randn(1, 8, 16, requires_grad=True)
        with pytest.raises(UsageError, match="must be on a CUDA device, or on the CPU with TRITON"):
            flash_attention_triton(x, x, x)

    def test_bf16_in_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        x = torch.randn(1, 8, 16, dtype=torch.bfloat16)
        with pytest.raises(UsageError, match="which Triton's interpreter gets wrong, got 'cpu'"):
            flash_attention_triton(x, x, x)

    @pytest.mark.parametrize(
        ("batch", "lengths"), [(0, (5, 5)), (2, (0, 5)), (2, (5, 0)), (0, (0, 0))]
    )
    def test_empty_inputs(self, batch: int, lengths: tuple[int, int]) -> None:
        q, k, v, do = make("contiguous", (2, 1), lengths, 16, torch.float32, batch=batch)
        o, dq, dk, dv = run(flash_attention_triton, q, k, v, do, is_causal=True)
        for got, like in ((o, q), (dq, q), (dk, k), (dv, v)):
            assert torch.equal(got, torch.zeros_like(like))
